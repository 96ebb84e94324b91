'use strict';
// One clock drives every video: they never play by themselves, each is set to the clock's picture.
const body = document.body, videos = [...document.querySelectorAll('video')];
const FPS = +body.dataset.fps, FRAMES = +body.dataset.frames, REST = 8;  // REST: pictures that the end stays
const all = s => document.querySelectorAll(s);
const pairs = JSON.parse(document.getElementById('pair-data')?.textContent ?? '[]');  // of the demo's page
const seen = new Set(), blobs = new Map();
let now = 0, playing = !matchMedia('(prefers-reduced-motion: reduce)').matches, before = null;

const picture = () => Math.min(FRAMES - 1, Math.floor(now));
const latent = k => k ? 1 + Math.floor((k - 1) / 4) : 0;

function blob(uri) {  // some browsers play no data URI, but all play a blob made of it
  if (!blobs.has(uri)) {
    const bytes = Uint8Array.from(atob(uri.slice(uri.indexOf(',') + 1)), c => c.charCodeAt(0));
    blobs.set(uri, URL.createObjectURL(new Blob([bytes], {type: 'video/mp4'})));
  }
  return blobs.get(uri);
}

function seek(v) {
  const at = (picture() + .5) / FPS;
  if (v.readyState && !v.seeking && Math.abs(v.currentTime - at) > .01 && (seen.has(v) || !playing)) v.currentTime = at;
}

function show() {
  const k = picture();
  videos.forEach(seek);
  all('.scrub').forEach(s => s.value = k);
  all('.when').forEach(o => o.textContent = `${(k / FPS).toFixed(2)} s`);
  all('[data-given]').forEach(f => f.classList.toggle('made', latent(k) >= +f.dataset.given));
  all('.playhead').forEach(p => {
    const x = +p.dataset.left + p.dataset.side * (k ? 1 + (k - .5) / 4 : .5);
    p.setAttribute('x1', x); p.setAttribute('x2', x);
  });
  body.dataset.picture = k;
}

function play(on) {
  playing = on; before = null;
  all('.play').forEach(b => b.textContent = on ? 'Pause' : 'Play');
  if (on) requestAnimationFrame(tick); else show();
}

function tick(time) {
  if (!playing) return;
  const was = picture();
  if (before !== null) now = (now + Math.min(time - before, 250) / 1000 * FPS) % (FRAMES + REST);
  before = time;
  if (picture() !== was) show();
  requestAnimationFrame(tick);
}

function choose(i) {
  const p = pairs[i], box = document.getElementById('pair-box');
  all('[data-pair]').forEach(b => b.setAttribute('aria-pressed', b.dataset.pair == i));
  ['winner', 'loser'].forEach((side, j) => {
    const v = box.querySelector('.' + side);
    v.src = blob(p[side]);
    v.parentNode.querySelector('small').textContent = p.scores[j];
  });
  box.querySelector('.line').innerHTML = p.timeline;
  box.querySelector('.caption').textContent = p.caption;
  box.querySelector('.whole').textContent = p.note;
  show();
}

function goTo() {  // #section&t=0.5&pair=3
  const asked = new URLSearchParams(location.hash.slice(1)), n = asked.get('pair') - 1;
  if (pairs[n]) choose(n);
  if (asked.has('t')) {
    now = Math.round(Math.min(1, Math.max(0, +asked.get('t') || 0)) * (FRAMES - 1));
    play(false);
  }
  for (const name of asked.keys()) document.querySelector(`section[id="${CSS.escape(name)}"]`)?.scrollIntoView();
}

let settled = 0, loaded = 0;
function settle(ok) {
  settled += 1; loaded += ok;
  if (settled < videos.length) return;
  body.dataset.videos = `${loaded} of ${videos.length}`;
  if (loaded < videos.length) document.getElementById('broken').hidden = false;
  body.dataset.ready = '1';
}

const watch = new IntersectionObserver(entries => entries.forEach(e => {
  e.isIntersecting ? seen.add(e.target) : seen.delete(e.target);
  seek(e.target);
}), {rootMargin: '100px'});
videos.forEach(v => {
  let first = true;
  const once = ok => { if (first) { first = false; settle(ok); } };
  v.addEventListener('loadedmetadata', () => { once(true); seek(v); });
  v.addEventListener('error', () => once(false));
  v.addEventListener('seeked', () => seek(v));
  if (v.dataset.src) v.src = blob(v.dataset.src);
  v.removeAttribute('data-src');
  watch.observe(v);
});
all('.scrub').forEach(s => {
  s.max = FRAMES - 1;
  s.addEventListener('input', () => { now = +s.value; play(false); });
  s.addEventListener('change', () => {
    try { history.replaceState(null, '', '#t=' + (now / (FRAMES - 1)).toFixed(3)); } catch {}
  });
});
all('.play').forEach(b => b.addEventListener('click', () => play(!playing)));
all('[data-pair]').forEach(b => b.addEventListener('click', () => choose(+b.dataset.pair)));
addEventListener('hashchange', goTo);
if (pairs.length) choose(0);
play(playing);
goTo();

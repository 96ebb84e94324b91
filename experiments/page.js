'use strict';
// One clock drives every video, so that all show the same moment: none plays by itself, each is set to its picture.
const body = document.body, videos = [...document.querySelectorAll('video')], seen = new Set();
const scrub = document.querySelector('.scrub'), button = document.querySelector('.play');
const FPS = +body.dataset.fps, FRAMES = +body.dataset.frames, REST = 8;  // REST: pictures for which the end stays
const trails = [...document.querySelectorAll('svg[data-path]')].map(trail);
let picture = 0, playing = !matchMedia('(prefers-reduced-motion: reduce)').matches, timer = 0, settled = 0, loaded = 0;

function trail(svg) {  // draws the ball's whole path, and returns what draws the path up to a picture
  const {path, bad} = svg.dataset, at = path.split(' ');
  const line = (flag, end) => at.slice(0, end).map((from, k) =>
    bad[k] === flag ? (bad[k - 1] === flag ? '' : `M${from}`) + `L${at[k + 1]}` : '').join('');
  svg.innerHTML += '<g class=whole><path/><path class=bad /></g><path/><path class=bad /><circle r=1.3 />';
  const [good, faulty, goodNow, faultyNow] = svg.querySelectorAll('path'), ball = svg.querySelector('circle');
  const draw = (one, other, end) => { one.setAttribute('d', line('0', end)); other.setAttribute('d', line('1', end)); };
  draw(good, faulty, at.length - 1);
  return k => {
    draw(goodNow, faultyNow, k);
    [ball.cx.baseVal.value, ball.cy.baseVal.value] = at[k].split(',');
  };
}

function seek(v) {  // while playing, only what is in sight
  const at = (picture + .5) / FPS;
  if (v.readyState && !v.seeking && Math.abs(v.currentTime - at) > .01 && (seen.has(v) || !playing)) v.currentTime = at;
}

function show(k, on) {  // from now on it plays, or stays
  picture = Math.min(FRAMES - 1, k); playing = on;
  clearTimeout(timer);
  if (on) timer = setTimeout(() => show((k + 1) % (FRAMES + REST), true), 1000 / FPS);
  const latent = picture ? 1 + Math.floor((picture - 1) / 4) : 0;
  videos.forEach(seek);
  trails.forEach(draw => draw(picture));
  scrub.value = picture;
  button.textContent = on ? 'Pause' : 'Play';
  document.querySelector('.when').textContent = `${(picture / FPS).toFixed(2)} s`;
  document.querySelectorAll('[data-given]').forEach(f => f.classList.toggle('made', latent >= +f.dataset.given));
  body.dataset.picture = picture;
}

function goTo() {  // #t=0.5: halfway
  const share = parseFloat(location.hash.slice(3));
  if (share >= 0) show(Math.round(Math.min(1, share) * (FRAMES - 1)), false);
}

function settle(ok) {
  settled += 1; loaded += ok;
  if (settled < videos.length) return;
  body.dataset.videos = `${loaded} of ${videos.length}`;
  document.getElementById('broken').hidden = loaded === videos.length;
}

const watch = new IntersectionObserver(entries => entries.forEach(e => {
  e.isIntersecting ? seen.add(e.target) : seen.delete(e.target);
  seek(e.target);
}), {rootMargin: '100px'});
for (const v of videos) {
  v.addEventListener('loadedmetadata', () => { settle(true); seek(v); });
  v.addEventListener('error', () => settle(false));
  v.addEventListener('seeked', () => seek(v));
  // some browsers play no data URI, but all play a blob made of it
  const bytes = Uint8Array.from(atob(v.dataset.mp4), c => c.charCodeAt(0));
  v.src = URL.createObjectURL(new Blob([bytes], {type: 'video/mp4'}));
  watch.observe(v);
}
scrub.max = FRAMES - 1;
scrub.addEventListener('input', () => show(+scrub.value, false));
button.addEventListener('click', () => show(picture, !playing));
addEventListener('hashchange', goTo);
show(0, playing);
goTo();


// One prompt of one group of methods at a time; #players&group=2&prompt=3 chooses.
const shown = JSON.parse(document.getElementById('shown-data').textContent);
const slots = [...all('#shown .cell')], chosen = {group: 0, prompt: 0};

function fill() {
  const methods = shown.groups[chosen.group];
  slots.forEach((slot, i) => {
    const method = methods[i] ?? '', [uri, score] = shown.clips[method][chosen.prompt];
    const number = document.createElement('small');
    number.textContent = score;
    slot.hidden = i >= methods.length;  // one that is hidden holds the real clip
    slot.querySelector('video').src = blob(uri);
    slot.querySelector('figcaption').replaceChildren(shown.titles[method], number);
  });
  document.getElementById('shown-caption').textContent = shown.captions[chosen.prompt];
  for (const kind in chosen) all(`[data-${kind}]`).forEach(b => b.setAttribute('aria-pressed', b.dataset[kind] == chosen[kind]));
  show();
}

function ask() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const most = {group: shown.groups.length, prompt: shown.captions.length};
  for (const kind in chosen) if (asked.get(kind) >= 1 && asked.get(kind) <= most[kind]) chosen[kind] = asked.get(kind) - 1;
  fill();
}

for (const kind in chosen) all(`[data-${kind}]`).forEach(b => b.addEventListener('click', () => {
  chosen[kind] = +b.dataset[kind];
  fill();
}));
addEventListener('hashchange', ask);
ask();

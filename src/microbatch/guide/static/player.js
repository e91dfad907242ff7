// Play, pause, step and scrub one integer. Nothing runs while it is paused, hidden or off screen.

// Of an event while it is played: its words come first, then it happens, then there is a pause.
const WORDS = 0.4, PAUSE = 0.7;

export function makePlayer(place, { length, index, label, onWords, onChange }) {
  let at = index, timer = null, visible = true, ahead = false;
  const later = (seconds, what) => { timer = setTimeout(what, seconds * 1000 * Math.min(1, 20 / length)); };
  const button = (name, words) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = name;
    made.setAttribute("aria-label", `${words}: ${label}`);
    return made;
  };
  const row = document.createElement("div");
  row.className = "player";
  const play = button("Play", "Play"), back = button("‹", "Back"), next = button("›", "Next");
  const scrub = document.createElement("input");
  Object.assign(scrub, { type: "range", min: 0, max: length - 1, step: 1, value: at });
  scrub.setAttribute("aria-label", `Event of ${label}`);
  const output = document.createElement("output");
  row.append(play, back, next, scrub, output);
  place.append(row);

  function show(value, told = true) {
    at = Math.max(0, Math.min(length - 1, value));
    scrub.value = at;
    output.textContent = `${at} / ${length - 1}`;
    back.disabled = at === 0;
    next.disabled = at === length - 1;
    onChange(at, told);
  }
  function stop() {
    clearTimeout(timer);
    timer = null;
    if (ahead) onWords(at);
    ahead = false;
    play.textContent = "Play";
    play.setAttribute("aria-label", `Play: ${label}`);
  }
  function tick() {
    if (at === length - 1 || !visible || document.hidden) return stop();
    onWords(at + 1);
    ahead = true;
    later(WORDS, () => {
      ahead = false;
      show(at + 1);
      later(PAUSE, tick);
    });
  }
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (at === length - 1) show(0);
    play.textContent = "Pause";
    play.setAttribute("aria-label", `Pause: ${label}`);
    timer = setTimeout(tick, 350);
  });
  back.addEventListener("click", () => (stop(), show(at - 1), back.disabled && next.focus()));
  next.addEventListener("click", () => (stop(), show(at + 1), next.disabled && back.focus()));
  scrub.addEventListener("input", () => (stop(), show(Number(scrub.value))));
  new IntersectionObserver(([entry]) => {
    visible = entry.isIntersecting;
    if (!visible && timer !== null) stop();
  }).observe(place.closest("figure"));
  show(at, false);
  return { show, stop, get index() { return at; } };
}

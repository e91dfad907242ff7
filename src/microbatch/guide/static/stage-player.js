// The stage under the reader's hand: cut, play, step, drag. A frame is drawn only while it plays and is in sight.

import { lay } from "./nodes.js";
import { CUTS, fits, LAST, momentOf, plan, stateAt, words } from "./stage.js";
import { SHAPES, stagePicture } from "./stage-picture.js";

const NARROW = 460; // pixels below which the narrow shape is drawn

export function startStage(figure, measured, { cut, t, playsItself = false, onMove = () => {}, onRest = () => {} }) {
  const find = (name) => figure.querySelector(`[data-${name}]`);
  const drawing = find("drawing"), say = find("say"), name = figure.dataset.figure;
  let shape = null, tree = null, drawn = null, playing = false, last = 0, exact = 0, sight = false, touched = false, waiting = null, said = "";

  // -- what is shown ------------------------------------------------------------------------------------------------

  function show() {
    const fitting = drawing.clientWidth < NARROW ? SHAPES.narrow : SHAPES.wide;
    const next = stagePicture(cut, t, measured, fitting);
    if (fitting !== shape) {
      shape = fitting;
      tree = null;
      drawing.replaceChildren(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
      drawn = drawing.firstChild;
    }
    drawn = lay(drawn, next, tree);
    tree = next;
    const state = stateAt(cut, t, measured), spoken = words(state);
    if (spoken !== said) say.textContent = said = spoken;
    scrub.value = t;
    scrub.setAttribute("aria-valuetext", spoken);
    onMove(state);
  }

  function go(to, by = "reader") {
    t = Math.max(0, Math.min(LAST, Math.round(to)));
    exact = t;
    if (by === "reader") touched = true;
    show();
    if (!playing) rest();
  }

  function choose(number) {
    cut = number;
    for (const each of cuts.querySelectorAll("button")) each.setAttribute("aria-pressed", String(Number(each.value) === cut));
  }

  // Where the reader leaves it is kept; where it plays by itself is not.
  const rest = () => touched && onRest(cut, t);

  // -- playing ------------------------------------------------------------------------------------------------------

  function play() {
    if (t >= LAST) exact = t = 0;
    playing = true;
    last = 0;
    mark();
    requestAnimationFrame(frame);
  }
  function pause() {
    if (!playing) return;
    playing = false;
    mark();
    rest();
  }
  function mark() {
    button.play.textContent = playing ? "❚❚" : "▶";
    button.play.setAttribute("aria-label", `${playing ? "Pause" : "Play"}: ${label}`);
    figure.dataset.playing = playing;
  }
  function frame(now) {
    if (!playing) return;
    if (!sight || document.hidden) return pause();
    const passed = last ? Math.min(100, now - last) / 1000 : 0;
    last = now;
    exact += (passed / plan(cut, measured).end) * LAST;
    t = Math.min(LAST, Math.round(exact));
    show();
    if (t < LAST) return requestAnimationFrame(frame);
    pause();
    // By itself it goes on once: the batch that did not fit, then the same batch cut.
    if (playsItself && !touched && !fits(cut, measured)) waiting = setTimeout(() => touched || (choose(4), go(0, "itself"), sight && play()), 900);
  }

  // -- what the reader does -----------------------------------------------------------------------------------------

  const label = "one step of training", button = {};
  const make = (key, written, spoken, onClick) => {
    button[key] = Object.assign(document.createElement("button"), { type: "button", textContent: written });
    button[key].setAttribute("aria-label", `${spoken}: ${label}`);
    button[key].addEventListener("click", () => {
      touched = true;
      clearTimeout(waiting);
      onClick();
    });
    return button[key];
  };
  const to = (by) => {
    pause();
    const { at } = stateAt(cut, t, measured), here = momentOf(cut, at, measured);
    go(momentOf(cut, at + (by < 0 ? (t > here ? 0 : -1) : t < here ? 0 : 1), measured));
  };
  const scrub = Object.assign(document.createElement("input"), { type: "range", min: 0, max: LAST, step: 1, value: t });
  scrub.setAttribute("aria-label", `Moment of ${label}`);
  scrub.addEventListener("input", () => (pause(), go(Number(scrub.value))));
  const cuts = document.createElement("div");
  cuts.className = "cuts";
  cuts.setAttribute("role", "group");
  cuts.setAttribute("aria-label", `${measured.reference.batch} rows cut in`);
  const lead = Object.assign(document.createElement("span"), { textContent: `${measured.reference.batch} rows cut in` });
  cuts.append(...CUTS.map((number) => {
    const each = Object.assign(document.createElement("button"), { type: "button", value: number, textContent: number });
    each.addEventListener("click", () => {
      clearTimeout(waiting);
      touched = true;
      choose(number);
      go(moving() ? 0 : LAST);
      if (moving() && !playing) play();
    });
    return each;
  }));
  find("controls").append(lead, cuts);
  find("player").append(make("play", "▶", "Play", () => (playing ? pause() : play())), make("back", "‹", "Back", () => to(-1)), make("next", "›", "Next", () => to(1)), scrub);
  find("controls").hidden = find("player").hidden = false;

  drawing.addEventListener("click", ({ target }) => {
    const microbatch = target.closest("[data-microbatch]");
    if (!microbatch) return;
    clearTimeout(waiting);
    const { moves } = plan(cut, measured);
    go(momentOf(cut, moves.findIndex(({ phase, index }) => phase === "take" && index === Number(microbatch.dataset.microbatch)), measured));
  });
  const drag = (event) => {
    const region = drawing.querySelector("[data-scrub]").getBoundingClientRect(), edge = (4 / shape.width) * drawing.clientWidth;
    clearTimeout(waiting);
    pause();
    go(((event.clientX - region.left - edge) / (region.width - 2 * edge)) * LAST);
  };
  drawing.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("[data-scrub]")) return;
    drawing.setPointerCapture(event.pointerId);
    drag(event);
  });
  drawing.addEventListener("pointermove", (event) => drawing.hasPointerCapture(event.pointerId) && drag(event));
  figure.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || event.target.matches("input, [role=region]")) return;
    event.preventDefault();
    touched = true;
    clearTimeout(waiting);
    to(by);
  });

  // -- how it begins ------------------------------------------------------------------------------------------------

  const moving = () => !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const itself = playsItself && moving();
  choose(itself ? 1 : cut);
  if (itself) t = exact = 0;
  mark();
  show();
  new IntersectionObserver(([entry]) => {
    sight = entry.intersectionRatio > 0.35;
    if (!sight) pause();
    else if (itself && !touched && !playing && t < LAST) play();
  }, { threshold: [0, 0.35, 0.6] }).observe(drawing);
  new ResizeObserver(() => (drawing.clientWidth < NARROW) !== (shape === SHAPES.narrow) && show()).observe(drawing);
  return {
    go: (to) => (pause(), go(to)),
    // The next move of that kind; of the whole batch where `of` is 1.
    phase(phase, of) {
      pause();
      if ((of === 1) !== (cut === 1)) (choose(of), (t = 0));
      const { moves } = plan(cut, measured), { at } = stateAt(cut, t, measured), found = (from) => moves.findIndex((move, number) => number >= from && move.phase === phase);
      const next = [found(at + 1), found(0)].find((number) => number >= 0) ?? moves.length - 1; // memory ended before it
      go(momentOf(cut, next, measured));
    },
    get name() { return name; },
  };
}

// Make the page's figures, quiz and playground interactive. What is here already can be read without.

import { drawnTo, FIGURES, RULES, START, TANK, tankScale, VIEWS } from "./figures.js";
import { startPaste } from "./paste.js";
import { startPlayground } from "./playground.js";
import { show } from "./readout.js";
import { CUTS, LAST } from "./stage.js";
import { startStage } from "./stage-player.js";
import { readMoment } from "./state.js";
import { count } from "./svg.js";
import { MIB, TANKS } from "./tank.js";
import { startTheme } from "./theme.js";

const { measured, fields, presets } = JSON.parse(document.getElementById("data").textContent);
const notices = [];

startTheme();

function place(name) {
  const figure = document.querySelector(`[data-figure="${name}"]`);
  const controls = figure.querySelector("[data-controls]");
  controls.hidden = false;
  return { figure, controls, show: (drawn) => (show(figure, drawn), drawn) };
}

function slider(controls, label, { min, max, step = 1, value, name = String }, onInput) {
  const wrap = document.createElement("label");
  const range = Object.assign(document.createElement("input"), { type: "range", min, max, step, value });
  const output = document.createElement("output");
  wrap.append(label, range, output);
  controls.append(wrap);
  const write = () => {
    output.textContent = name(Number(range.value));
    range.setAttribute("aria-valuetext", output.textContent);
  };
  range.addEventListener("input", () => (write(), onInput(Number(range.value))));
  write();
  return { range, write };
}

function select(controls, label, choices, value, onChange) {
  const wrap = document.createElement("label");
  const list = document.createElement("select");
  for (const [key, words] of Object.entries(choices)) list.add(new Option(words, key, key === value, key === value));
  wrap.append(label, list);
  controls.append(wrap);
  list.addEventListener("change", () => onChange(list.value));
}

// What is open where there is room for it is folded on a phone, until the reader opens it; turning the phone keeps that.
const phone = matchMedia("(max-width: 40rem), (max-height: 30rem)"), folds = [...document.querySelectorAll("[data-fold]")];
let opened = [];
function fold() {
  if (!phone.matches) opened = folds.filter((each) => each.open);
  for (const each of folds) each.open = !phone.matches || opened.includes(each);
}
fold();
phone.addEventListener("change", fold);
// The list of sections is open where it fits beside the name; else it is folded again once it was used.
const wide = matchMedia("(min-width: 62rem)"), sections = document.querySelector(".top details");
const list = () => (sections.open = wide.matches);
list();
wide.addEventListener("change", list);
sections.addEventListener("click", ({ target }) => target.closest("a") && list());

// -- figures that are chosen ------------------------------------------------------------------------------------------

const sizes = Object.keys(measured.memory.alone).map(Number).sort((one, other) => one - other);

function wireTank() {
  const { figure, controls, show } = place("tank"), state = { ...START.tank, cut: 1 };
  const half = Object.assign(document.createElement("button"), { type: "button", className: "button", textContent: "Cut it in half" });
  const on = Object.assign(document.createElement("a"), { href: "#split", textContent: "It fits. On to the split" });
  const way = document.createElement("p");
  way.className = "way";
  way.append(half, on);
  figure.querySelector("figcaption").prepend(way);
  const draw = () => {
    const { over } = show(FIGURES.tank(state, measured));
    half.hidden = !over || state.batch === state.cut;
    on.hidden = over || state.cut === 1;
  };
  const batch = slider(controls, "Batch", { min: 0, max: sizes.length - 1, value: sizes.indexOf(state.batch), name: (index) => `${sizes[index]}` },
    (index) => ((state.batch = sizes[index]), (state.cut = 1), draw()));
  const tank = slider(controls, "Tank", { min: TANKS.low, max: TANKS.high, step: TANKS.step, value: state.tank, name: (mib) => `${mib} MiB` },
    (mib) => ((state.tank = mib), (state.cut = 1), draw()));
  half.addEventListener("click", () => {
    state.cut *= 2;
    draw();
    if (half.hidden) on.focus();
    splitTo(state.batch, state.batch / state.cut);
  });
  // What is in the tank, and its rim, can be drawn up and down.
  const drawing = figure.querySelector("[data-drawing]");
  let what = null, off = 0, from = 0;
  const levelOf = ({ clientY }) => {
    const { top, height } = drawing.firstElementChild.getBoundingClientRect();
    return (TANK.bottom - ((clientY - top) / height) * drawing.firstElementChild.viewBox.baseVal.height) / tankScale(measured);
  };
  const drag = (event) => {
    const level = levelOf(event) - off, { range } = what === "tank" ? tank : batch;
    const value = what === "tank" ? level / MIB : drawnTo(from, level, sizes, measured);
    if (Number(range.value) === value) return;
    range.value = value;
    range.dispatchEvent(new Event("input"));
  };
  drawing.addEventListener("pointerdown", (event) => {
    what = event.target.closest("[data-drag]")?.dataset.drag ?? null;
    if (!what) return;
    event.preventDefault();
    from = sizes.indexOf(state.batch);
    off = levelOf(event) - (what === "tank" ? state.tank * MIB : measured.memory.window[state.batch / state.cut].total);
    drawing.setPointerCapture(event.pointerId);
  });
  drawing.addEventListener("pointermove", (event) => what && drawing.hasPointerCapture(event.pointerId) && drag(event));
  drawing.addEventListener("lostpointercapture", () => (what = null));
  draw();
}

let splitTo; // what was cut in the tank goes on in the split

function wireSplit() {
  const { controls, show } = place("split"), state = { ...START.split };
  const draw = () => show(FIGURES.split(state, measured));
  const microbatch = () => (size.range.max = state.batch, state.microbatch = Math.min(state.microbatch, state.batch), size.range.value = state.microbatch, size.write());
  const batch = slider(controls, "Batch B", { min: 1, max: 96, value: state.batch }, (rows) => ((state.batch = rows), microbatch(), draw()));
  const size = slider(controls, "Microbatch m", { min: 1, max: state.batch, value: state.microbatch }, (rows) => ((state.microbatch = rows), draw()));
  splitTo = (rows, each) => {
    Object.assign(state, { batch: rows, microbatch: each });
    batch.range.value = rows;
    batch.write();
    microbatch();
    draw();
  };
  draw();
}

function wireMathematics() {
  const { controls, show } = place("mathematics"), state = { ...START.mathematics, lengths: [...START.mathematics.lengths] };
  const draw = () => show(FIGURES.mathematics(state, measured));
  select(controls, "Divided by", RULES, state.rule, (rule) => ((state.rule = rule), draw()));
  const lengths = document.createElement("div");
  lengths.className = "lengths";
  controls.append(lengths);
  state.lengths.forEach((length, index) =>
    slider(lengths, `Tokens ${index + 1}`, { min: 1, max: 16, value: length }, (tokens) => ((state.lengths[index] = tokens), draw())));
  draw();
}

function wireMemory() {
  const { controls, show } = place("memory"), state = { ...START.memory };
  const draw = () => show(FIGURES.memory(state, measured));
  const option = (name, key) => slider(controls, name, { min: 0, max: sizes.length - 1, value: sizes.indexOf(state[key]), name: (index) => count(sizes[index], "row") },
    (index) => ((state[key] = sizes[index]), draw()));
  option("Batch", "batch");
  option("Microbatch", "microbatch");
  draw();
}

function wireDifferences() {
  const { controls, show } = place("differences"), state = { ...START.differences };
  const draw = () => show(FIGURES.differences(state, measured));
  select(controls, "Show", VIEWS, state.view, (view) => ((state.view = view), draw()));
  draw();
}

function wireDecision() {
  const { figure, controls, show } = place("decision"), state = { path: [] };
  const buttons = {};
  const draw = () => {
    const drawn = FIGURES.decision(state, measured);
    show(drawn);
    buttons.yes.disabled = buttons.no.disabled = Boolean(drawn.end);
    buttons.again.disabled = state.path.length === 0;
  };
  const button = (name, words, onClick) => {
    buttons[name] = Object.assign(document.createElement("button"), { type: "button", textContent: words });
    buttons[name].addEventListener("click", () => {
      onClick();
      draw();
      // What was pressed may be no more: the keyboard goes on where it can.
      if (buttons[name].disabled) Object.values(buttons).find((each) => !each.disabled).focus();
    });
  };
  figure.querySelector("[data-say]").setAttribute("role", "status");
  button("yes", "Yes", () => state.path.push(true));
  button("no", "No", () => state.path.push(false));
  button("again", "Begin again", () => (state.path = []));
  controls.append(buttons.yes, buttons.no, buttons.again);
  draw();
}

// -- the stage --------------------------------------------------------------------------------------------------------

function wireStage(name, { playsItself = false, onMove } = {}) {
  const { cut, t, notice } = readMoment(location.search, name, { cuts: CUTS, last: LAST });
  if (notice) notices.push(notice);
  let waiting;
  return startStage(document.querySelector(`[data-figure="${name}"]`), measured, {
    ...(cut ? { cut, t } : START[name]), playsItself: playsItself && !cut, onMove,
    onRest(cut, t) {
      clearTimeout(waiting);
      waiting = setTimeout(() => remember(name, `${cut}-${t}`), 200);
    },
  });
}

// The moment is in the address, so that a link leads to it.
function remember(name, moment) {
  const query = new URLSearchParams(location.search);
  query.set(name, moment);
  history.replaceState(null, "", `?${query}#${name}`);
}

// The lines of code that belong to a move of the stage.
const LINES = { overflow: "forward", add: "backward", agree: "step" };

function wireCode() {
  const lines = [...document.querySelectorAll("#code [data-phase]")], whole = document.querySelector("#code .listing"); // comes first
  const written = lines.map((line) => line.textContent), cutOf = (line) => (whole.contains(line) ? 1 : null);
  const stage = wireStage("code", {
    onMove({ phase, cut, rows }) {
      for (const [number, line] of lines.entries()) {
        if (cut > 1) line.textContent = written[number].replace(/\b16\b/g, rows / cut);
        const now = (cutOf(line) === 1) === (cut === 1) && line.dataset.phase.split(" ").includes(LINES[phase] ?? phase);
        line.classList.toggle("now", now);
        if (now) line.setAttribute("aria-current", "step");
        else line.removeAttribute("aria-current");
      }
    },
  });
  const happening = lines.filter((line) => line.dataset.phase), see = (line) => stage.phase(line.dataset.phase.split(" ")[0], cutOf(line) ?? START.code.cut);
  for (const line of happening) line.addEventListener("click", () => see(line));
  for (const listing of document.querySelectorAll("#code .listing"))
    listing.addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, ArrowUp: -1 }[event.key], own = happening.filter((line) => listing.contains(line));
      if (!by) return;
      event.preventDefault();
      see(own[Math.max(0, Math.min(own.length - 1, own.findIndex((line) => line.classList.contains("now")) + by))]);
    });
}

// -- questions, copies, where one is ---------------------------------------------------------------------------------------

// Predict, then see: what a section says in bold waits for the answer.
function wireQuestions() {
  const questions = [...document.querySelectorAll(".question:has(.verdict)")], score = document.querySelector("[data-score]"), share = document.querySelector("[data-share]");
  const answers = new Map();
  for (const item of questions) {
    const bold = item.closest("section").querySelector(".remember");
    bold.hidden = item.querySelector("details").hidden = true;
    item.addEventListener("change", ({ target }) => {
      const right = target.hasAttribute("data-right");
      if (!answers.has(item)) answers.set(item, right); // the first answer counts
      item.querySelector("[data-verdict]").textContent = right ? "✓ Right." : "✗ Not this one.";
      Object.assign(item.querySelector("details"), { hidden: false, open: true });
      bold.hidden = false;
      score.textContent = tallied();
      share.hidden = false;
    });
  }
  const tallied = () => `${[...answers.values()].filter(Boolean).length} of ${questions.length} right${answers.size < questions.length ? `, ${questions.length - answers.size} to go` : ""}.`;
  score.textContent = `${count(questions.length, "question")} stand above, each beside or above the figure that answers it.`;
  share.querySelector("button").addEventListener("click", async () => {
    const words = `Gradient accumulation, ${tallied()} ${location.origin}${location.pathname}`;
    try {
      await navigator.clipboard.writeText(words);
      share.querySelector("span").textContent = "Copied.";
    } catch {
      share.querySelector("span").textContent = words;
    }
  });
}

function wireCopies() {
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const words = document.querySelector(`[data-copy-text="${button.dataset.copy}"]`).textContent;
      const said = document.querySelector("[data-copied]");
      try {
        await navigator.clipboard.writeText(words);
        said.textContent = "Copied.";
      } catch {
        said.textContent = "The browser does not allow copying; select the text instead.";
      }
    });
  }
}

function wireSections() {
  const links = new Map([...document.querySelectorAll(".top nav a")].map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const link = links.get(target.id);
      if (isIntersecting) link?.setAttribute("aria-current", "true");
      else link?.removeAttribute("aria-current");
    }
  }, { rootMargin: "-30% 0px -60% 0px" });
  for (const section of document.querySelectorAll("main > section")) observer.observe(section);
}

wireStage("hero", { playsItself: true });
wireTank();
wireSplit();
wireStage("loop");
wireMathematics();
wireCode();
wireMemory();
wireDifferences();
wireDecision();
wireQuestions();
wireCopies();
wireSections();
startPaste();
startPlayground({ fields, presets, notices, recorded: document.documentElement.dataset.mode === "recorded" });

// Make the page's figures, quiz and playground interactive. What is here already can be read without.

import { FIGURES, RULES, START, VIEWS, loop, saw } from "./figures.js";
import { events } from "./phases.js";
import { startPaste } from "./paste.js";
import { makePlayer } from "./player.js";
import { startPlayground } from "./playground.js";
import { readIndex } from "./state.js";
import { count } from "./svg.js";
import { TANKS } from "./tank.js";
import { startTheme } from "./theme.js";

const { measured, fields, presets } = JSON.parse(document.getElementById("data").textContent);
const notices = [];

startTheme();

function place(name) {
  const figure = document.querySelector(`[data-figure="${name}"]`);
  const controls = figure.querySelector("[data-controls]");
  controls.hidden = false;
  return {
    figure, controls,
    show({ svg, say, table }) {
      figure.querySelector("[data-drawing]").innerHTML = svg;
      figure.querySelector("[data-say]").textContent = say;
      figure.querySelector("[data-table]").innerHTML = table;
    },
  };
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

// -- figures that are chosen ------------------------------------------------------------------------------------------

const sizes = Object.keys(measured.memory.alone).map(Number).sort((one, other) => one - other);

function wireTank() {
  const { controls, show } = place("tank"), state = { ...START.tank };
  const draw = () => show(FIGURES.tank(state, measured));
  slider(controls, "Batch", { min: 0, max: sizes.length - 1, value: sizes.indexOf(state.batch), name: (index) => `${sizes[index]}` },
    (index) => ((state.batch = sizes[index]), draw()));
  slider(controls, "Tank", { min: TANKS.low, max: TANKS.high, step: TANKS.step, value: state.tank, name: (mib) => `${mib} MiB` },
    (mib) => ((state.tank = mib), draw()));
  draw();
}

function wireGuess() {
  const guess = document.querySelector("[data-guess]");
  guess.hidden = false;
  guess.addEventListener("change", ({ target }) => {
    guess.querySelector("[data-guess-answer]").textContent = target.value === "activations"
      ? "Yes: every row leaves its own behind. Move the batch and see."
      : `Not ${target.value}: they are as large as the model, for one row or a thousand. Move the batch and see what grows.`;
  });
}

function wireSplit() {
  const { controls, show } = place("split"), state = { ...START.split };
  const draw = () => show(FIGURES.split(state, measured));
  const microbatch = () => (size.range.max = state.batch, state.microbatch = Math.min(state.microbatch, state.batch), size.range.value = state.microbatch, size.write());
  slider(controls, "Batch B", { min: 1, max: 96, value: state.batch }, (rows) => ((state.batch = rows), microbatch(), draw()));
  const size = slider(controls, "Microbatch m", { min: 1, max: state.batch, value: state.microbatch }, (rows) => ((state.microbatch = rows), draw()));
  draw();
}

function wireMathematics() {
  const { controls, show } = place("mathematics"), state = { ...START.mathematics, lengths: [...START.mathematics.lengths] };
  const draw = () => show(FIGURES.mathematics(state, measured));
  select(controls, "Denominator", RULES, state.rule, (rule) => ((state.rule = rule), draw()));
  const lengths = document.createElement("div");
  lengths.className = "lengths";
  controls.append(lengths);
  state.lengths.forEach((length, index) =>
    slider(lengths, `Tokens of ${index + 1}`, { min: 1, max: 16, value: length }, (tokens) => ((state.lengths[index] = tokens), draw())));
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

// -- figures that are played ------------------------------------------------------------------------------------------

function wirePlayer(name, { length, label, draw, start }) {
  const { figure, controls, show } = place(name);
  const { index, notice } = readIndex(location.search, name, length);
  if (notice) notices.push(notice);
  let waiting;
  return makePlayer(controls, {
    length, label, index: index ?? start,
    onWords(at) {
      figure.querySelector("[data-say]").textContent = draw(at).say;
    },
    onChange(at, told) {
      show(draw(at));
      if (!told) return;
      clearTimeout(waiting);
      waiting = setTimeout(() => remember(name, at), 200);
    },
  });
}

// The event is in the address, so that a link leads to it.
function remember(name, at) {
  const query = new URLSearchParams(location.search);
  query.set(name, at);
  history.replaceState(null, "", `?${query}#${{ saw: "memory" }[name] ?? name}`);
}

function wireLoop() {
  const microbatches = 4, length = events(microbatches).length;
  const player = wirePlayer("loop", { length, label: "the loop", start: START.loop.index, draw: (at) => loop(at, { microbatches }) });
  document.querySelector('[data-figure="loop"]').addEventListener("keydown", (event) => {
    if (event.target.matches("input")) return;
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) (event.preventDefault(), player.stop(), player.show(player.index + by));
  });
}

function wireCode() {
  const microbatches = START.code.microbatches, lines = [...document.querySelectorAll("#code [data-phase]")];
  wirePlayer("code", {
    length: events(microbatches).length, label: "the code", start: START.code.index,
    draw(at) {
      const drawn = loop(at, { microbatches });
      for (const line of lines) {
        const now = line.dataset.phase.split(" ").includes(drawn.event.phase);
        line.classList.toggle("now", now);
        if (now) line.setAttribute("aria-current", "step");
        else line.removeAttribute("aria-current");
      }
      return drawn;
    },
  });
}

function wireSaw() {
  const length = measured.inside.series.activations.length;
  wirePlayer("saw", { length, label: "the memory of a step", start: START.saw.index, draw: (at) => saw(at, measured) });
}

// -- quiz, copies, where one is ---------------------------------------------------------------------------------------

function wireQuiz() {
  for (const item of document.querySelectorAll(".quiz .question"))
    item.addEventListener("change", ({ target }) => {
      const right = target.hasAttribute("data-right");
      item.querySelector("[data-verdict]").textContent = right ? "✓ Right." : "✗ Not this one.";
      item.querySelector("details").open = true;
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

wireTank();
wireGuess();
wireSplit();
wireLoop();
wireMathematics();
wireCode();
wireMemory();
wireSaw();
wireDifferences();
wireDecision();
wireQuiz();
wireCopies();
wireSections();
startPaste();
startPlayground({ fields, presets, notices, recorded: document.documentElement.dataset.mode === "recorded" });

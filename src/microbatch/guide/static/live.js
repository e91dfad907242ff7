// The live view: run directories as the server reads them, drawn anew when there is news, and only then.

import * as panes from "./live-panes.js";
import { show } from "./readout.js";
import { bytes, grouped } from "./svg.js";
import { startTheme } from "./theme.js";

startTheme();

const find = (name) => document.querySelector(`[data-${name}]`);
const state = { runs: [], chosen: 0, step: undefined };
let dirty = false;

const PANES = [
  ["Loss", (s) => panes.lossOf(s.runs)], ["Memory", (s) => panes.memoryOf(s.runs[s.chosen], s.step)],
  ["A step’s time", (s) => panes.timelineOf(s.runs[s.chosen], s.step)], ["Validation", (s) => panes.validationOf(s.runs)],
  ["Throughput", (s) => panes.speedOf(s.runs)], ["Learning rate", (s) => panes.rateOf(s.runs)],
  ["Gradient norm", (s) => panes.normOf(s.runs)], ["Noise scale", (s) => panes.noiseOf(s.runs)],
].map(([title, draw]) => ({ draw, figure: make(title) }));

function make(title) {
  const figure = document.createElement("figure");
  figure.className = "figure pane";
  figure.dataset.pane = title;
  figure.innerHTML = `<h2></h2><div class="controls" data-controls></div><div class="drawing" data-drawing></div><figcaption><p data-say></p>
    <details class="twin"><summary>The same as a table</summary><div class="scroll" tabindex="0" role="region" data-table></div></details></figcaption>`;
  figure.querySelector("h2").textContent = title;
  figure.querySelector("[data-table]").setAttribute("aria-label", `Table: ${title}`);
  figure.querySelector("details").addEventListener("toggle", redraw);
  find("panes").append(figure);
  return figure;
}

function draw() {
  dirty = false;
  for (const { draw: picture, figure } of PANES) show(figure, picture(state), { late: true });
  PANES[3].figure.hidden = state.runs.length === 1; // its validation is in the chart of its loss
  find("headline").innerHTML = panes.headlineOf(state.runs[state.chosen]);
  for (const run of state.runs) {
    run.status.textContent = panes.standing(run);
    run.notice.textContent = [run.wrong, run.trouble].filter(Boolean).join("; ");
    run.notice.hidden = !run.notice.textContent;
  }
  const happened = panes.happened(state.runs[state.chosen]).slice(-200);
  find("log").closest("details").hidden = !happened.length;
  find("log").replaceChildren(...happened.map((words) => Object.assign(document.createElement("li"), { textContent: words })));
  scrub.max = Math.max(1, state.runs[state.chosen]?.lines.at(-1)?.step ?? 1);
  if (state.step === undefined) scrub.value = scrub.max;
  shown.textContent = state.step === undefined ? "newest" : `step ${grouped(state.step)}`;
}

function redraw() {
  if (dirty) return;
  dirty = true;
  requestAnimationFrame(draw);
}

const scrub = Object.assign(document.createElement("input"), { type: "range", min: 1, max: 1, step: 1, value: 1 });
const shown = document.createElement("output");
const label = document.createElement("label");
label.append("Step", scrub, shown);
PANES[2].figure.querySelector("[data-controls]").append(label);
scrub.addEventListener("input", () => {
  state.step = scrub.value === scrub.max ? undefined : Number(scrub.value);
  redraw();
});

function list(run, number) {
  const row = document.createElement("p");
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: run.name });
  button.setAttribute("aria-pressed", String(number === state.chosen));
  button.addEventListener("click", () => {
    state.chosen = number;
    state.runs.forEach((each, index) => each.button.setAttribute("aria-pressed", String(index === number)));
    redraw();
  });
  run.button = button;
  run.status = document.createElement("span");
  run.status.setAttribute("role", "status");
  const written = (name, value) => (typeof value !== "number" || name === "seed" ? value : name === "memory" ? bytes(value) : value >= 1000 ? grouped(value) : value);
  const settings = Object.entries(run.settings).map(([name, value]) => `${name.replaceAll("_", " ")} ${written(name, value)}`).join(" · ");
  run.notice = Object.assign(document.createElement("div"), { className: "notice", hidden: true });
  if (state.runs.length > 1) row.append(button, " ");
  row.append(run.status, document.createElement("br"), Object.assign(document.createElement("small"), { textContent: settings }));
  find("runs").append(row, run.notice);
}

// One stream for all runs: a browser opens six connections to a server, and each tab holds one as long as it is seen.
function follow() {
  const source = new EventSource("api/live/events");
  source.onmessage = ({ data }) => {
    for (const { run, events } of JSON.parse(data)) for (const event of events) take(state.runs[run], event);
    redraw();
  };
  source.onopen = () => tell("");
  source.onerror = () => tell("The server does not answer any more; start it again with: microbatch guide path/to/run");
  return source;
}

// What begins with a reset is the run as a whole, so a stream may begin again at any time.
function take(run, event) {
  if (event.kind === "reset") Object.assign(run, { lines: [], totals: undefined, summary: null, silent: null, trouble: null });
  else if (event.kind === "totals") run.totals = event;
  else if (event.kind) run[event.kind] = event[event.kind];
  else run.lines.push(event);
}

function tell(words) {
  find("notice").textContent = words;
  find("notice").hidden = !words;
}

async function described() {
  try {
    return (await (await fetch("api/live")).json()).runs;
  } catch {
    return null;
  }
}

const runs = await described();
if (!runs?.length) {
  find("panes").hidden = true;
  tell(runs ? "No run was named. Look at one with: microbatch guide path/to/run" : "The server does not answer.");
} else {
  state.runs = runs.map(({ trouble, ...run }) => ({ ...run, wrong: trouble, lines: [] }));
  document.querySelector("h1").textContent = runs.length === 1 ? runs[0].name : `${runs.length} runs`;
  state.runs.forEach(list);
  let source = document.hidden ? null : follow();
  document.addEventListener("visibilitychange", () => {
    source?.close();
    source = document.hidden ? null : follow();
  });
}
redraw();

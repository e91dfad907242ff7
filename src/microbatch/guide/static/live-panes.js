// The pictures of runs: pure functions of their lines of metrics.

import { plot } from "./plot.js";
import { bytes, count, el, escaped, extent, figure, grouped, power, table, text } from "./svg.js";
import { legend, named, parts, tank, total } from "./tank.js";

const MOST = 400; // points of a curve; of a longer run, equally many steps share two: their lowest and their highest

// A loss of null was not finite: JSON has no other word for it.
const digits = (value) => (value === undefined ? "–" : value === null ? "not finite" : plain(Number(value.toPrecision(4))));

// What the runs count, as their lines say; several runs may count different things.
function unitOf(runs) {
  const units = new Set(runs.map(({ lines }) => lines.findLast(({ unit }) => unit)?.unit));
  return (units.size === 1 && [...units][0]) || "items";
}

const plain = (value) => (value >= 10_000 && value < 1e15 ? grouped(value) : String(value));

const nothing = (words) => ({ svg: figure(200, words, text(210, 100, words, { "text-anchor": "middle", class: "quiet" })), say: "", table: "" });

// The same positions for all runs: one a step, or two for each stretch of steps.
function positions(runs) {
  const last = extent([0, ...runs.flatMap(({ lines }) => lines.map(({ step }) => step))])[1];
  const stride = last <= MOST ? 1 : Math.ceil(last / (MOST / 2));
  const ends = Array.from({ length: Math.max(0, Math.ceil(last / stride)) }, (_, index) => Math.min(last, (index + 1) * stride));
  return { stride, steps: stride === 1 ? ends : ends.flatMap((end) => [end - Math.floor(stride / 2), end]) };
}

// The values of a run at those positions; where two stand for many steps, both extremes, in the order in which they came.
function drawn(lines, take, { stride, steps }) {
  const ys = new Array(steps.length).fill(null);
  if (stride === 1) {
    for (const line of lines) ys[line.step - 1] = take(line) ?? ys[line.step - 1];
    return ys;
  }
  const found = new Array(steps.length / 2).fill(null);
  for (const line of lines) {
    const value = take(line), index = Math.ceil(line.step / stride) - 1, known = found[index];
    if (value === null || value === undefined) continue;
    const point = { step: line.step, value };
    if (!known) found[index] = [point, point];
    else if (value < known[0].value) known[0] = point;
    else if (value > known[1].value) known[1] = point;
  }
  found.forEach((pair, index) => {
    if (!pair) return;
    const [first, second] = pair[0].step <= pair[1].step ? pair : [pair[1], pair[0]];
    ys[2 * index + 1] = second.value;
    if (first !== second) ys[2 * index] = first.value;
  });
  return ys;
}

function curve(runs, take, words) {
  const at = positions(runs), format = words.format ?? digits;
  const known = runs.map(({ name, lines }, look) => ({ name, look, ys: drawn(lines, take, at), last: take(lines.findLast((line) => take(line) !== undefined) ?? {}) }));
  const series = known.filter(({ ys }) => ys.some((value) => value !== null));
  if (!series.length) return nothing(known.some(({ last }) => last === null) ? "no value is finite" : words.none);
  const picture = plot({ label: words.label, xs: at.steps, x: "step", y: words.y, series, format, log: words.log, zero: words.zero ?? false, most: 12 });
  const last = series.map(({ name, last }) => `${series.length > 1 ? `${name}: ` : ""}${format(last)}`);
  const sampled = runs.some(({ totals }) => totals?.percent < 100);
  const thinned = sampled ? " Drawn is a sample; every step is being read." : at.stride > 1 ? ` Drawn are the lowest and the highest of every ${grouped(at.stride)} steps.` : "";
  return { ...picture, say: `${words.label}; now ${last.join(", ")}.${thinned}` };
}

// Of one run, the loss and the validation loss in one chart; of several, each run's loss.
export function lossOf(runs) {
  const words = { label: "Loss by step", y: "loss", none: "no step yet" };
  if (runs.length !== 1 || !runs[0].lines.some(({ validation }) => validation)) return curve(runs, (line) => line.loss, words);
  const validated = { ...runs[0], name: "validation", lines: runs[0].lines.map(({ step, validation }) => ({ step, loss: validation?.loss })) };
  return curve([{ ...runs[0], name: "training" }, validated], (line) => line.loss, { ...words, label: "Loss and validation loss by step" });
}

// Of several runs alone: of one it is in the chart of its loss.
export function validationOf(runs) {
  const losses = runs.flatMap(({ lines }) => lines.filter((line) => line.validation));
  // Few are drawn as they are, evenly spaced; many as every other curve.
  if (losses.length > MOST) return curve(runs, (line) => line.validation?.loss, { label: "Validation loss by step", y: "validation loss", none: "" });
  const known = runs.map(({ lines }) => new Map(lines.filter((line) => line.validation).map((line) => [line.step, line.validation.loss])));
  const steps = [...new Set(losses.map(({ step }) => step))].sort((one, other) => one - other);
  if (!steps.length) return nothing("not validated yet");
  const series = runs.map(({ name }, look) => ({ name, look, ys: steps.map((step) => known[look].get(step) ?? null) })).filter(({ look }) => known[look].size);
  const picture = plot({ label: "Validation loss by step", xs: steps, x: "step", y: "validation loss", zero: false, series, format: digits });
  const last = series.map(({ name, ys }) => `${series.length > 1 ? `${name}: ` : ""}${digits(ys.findLast((value) => value !== null))}`);
  return { ...picture, say: `Validation loss by step; now ${last.join(", ")}.` };
}

export const rateOf = (runs) => curve(runs, (line) => line.lr, { label: "Learning rate by step", y: "learning rate", none: "no step yet", log: true, format: power });
export const speedOf = (runs) => {
  const unit = unitOf(runs);
  return curve(runs, (line) => line.per_second, { label: `${unit[0].toUpperCase()}${unit.slice(1)} a second by step`, y: `${unit} a second`, zero: true, none: "no step yet" });
};
export const normOf = (runs) => curve(runs, (line) => line.grad_norm, { label: "Gradient norm by step, before clipping", y: "norm", none: "no step yet", log: true, format: power });
export const noiseOf = (runs) => curve(runs, (line) => line.noise_scale, { label: "Gradient noise scale by step, in samples", y: "samples", none: "measured every 20th step, from two microbatches on", log: true, format: power });

export function memoryOf(run, step) {
  const line = run?.lines.findLast((each) => each.memory && (step === undefined || each.step <= step));
  const peak = run?.totals?.peak_bytes ?? 0;
  const limit = run?.settings.memory > 0 ? run.settings.memory : undefined;
  if (!line) return nothing(peak ? `peak ${bytes(peak)}` : "no step was metered yet");
  const list = parts({ ...line.memory, total: Object.values(line.memory).reduce((sum, size) => sum + size, 0) });
  const scale = 170 / (Math.max(total(list), limit ?? 0, 1) * 1.06);
  const said = `${bytes(total(list))} at the peak of step ${grouped(line.step)}${limit === undefined ? "" : `, of ${bytes(limit)} allowed`}.`;
  const svg = figure(240, said, tank(30, 24, 90, 180, list, { scale, capacity: limit, label: `step ${grouped(line.step)}` }), legend(170, 48, list, { step: 28 }));
  return { svg, say: said, table: table(["part", `step ${grouped(line.step)}`], [...list, ["together", total(list)]].map(([role, size]) => [named(role), bytes(size)]), "Memory at the peak of a step") };
}

// Times have tones and patterns, not the colours of what is in memory.
const PHASES = { wait: null, forward: "stripes", backward: "hatch", finish: "dots", optimizer: null };

const time = (x, y, width, height, kind) =>
  el("g", { class: `time ${kind}` }, el("rect", { x, y, width, height, class: "fill" }),
    PHASES[kind] && el("rect", { x, y, width, height, fill: `url(#${PHASES[kind]})` }));

const WORDS = { wait: "wait for data", forward: "forward", backward: "backward", finish: "reduce, clip", optimizer: "optimizer" };

const MOST_DRAWN = 200; // pairs of forward and backward; of more microbatches, neighbours are drawn as one

const sumOf = (values) => values.reduce((sum, value) => sum + value, 0);

// A step as a strip of time: waiting, each microbatch's forward and backward, the end of the window, the optimizer.
export function timelineOf(run, step) {
  const line = run?.lines.findLast((each) => each.timeline && (step === undefined || each.step <= step));
  if (!line) return nothing("no timeline yet");
  const { timeline } = line;
  const pieces = [["wait", timeline.wait]];
  const together = Math.ceil(timeline.forward.length / MOST_DRAWN);
  for (let index = 0; index < timeline.forward.length; index += together)
    for (const kind of ["forward", "backward"]) pieces.push([kind, sumOf(timeline[kind].slice(index, index + together)), index / together]);
  pieces.push(["finish", timeline.finish], ["optimizer", timeline.optimizer]);
  const sum = pieces.reduce((all, [, seconds]) => all + seconds, 0) || 1;
  const begins = [];
  let left = 8;
  const strip = pieces.map(([kind, seconds, index]) => {
    const width = (seconds / sum) * 404, from = left;
    left += width;
    if (kind === "forward") begins[index] = from;
    // Over each microbatch its number, where there is room for it.
    const number = kind === "backward" && left - begins[index] > 26
      ? text((begins[index] + left) / 2, 20, index + 1, { "text-anchor": "middle", class: "number" }) : null;
    return [time(from, 30, width, 40, kind), number];
  });
  const sums = Object.keys(PHASES).map((kind) => [kind, pieces.filter(([each]) => each === kind).reduce((all, [, seconds]) => all + seconds, 0)]);
  const ms = (seconds) => (seconds >= 0.9995 ? `${seconds.toPrecision(3)} s` : `${(seconds * 1000).toPrecision(3)} ms`);
  const said = `Step ${grouped(line.step)}: ${count(timeline.forward.length, "microbatch", "microbatches")} in ${ms(sum)}.`;
  const svg = figure(214, said, strip, el("rect", { class: "slot", x: 8, y: 30, width: 404, height: 40 }),
    sums.map(([kind, seconds], row) => [time(8, 88 + row * 25, 15, 15, kind), text(32, 100 + row * 25, WORDS[kind]),
      text(300, 100 + row * 25, ms(seconds), { "text-anchor": "end", class: "number" }), text(410, 100 + row * 25, `${Math.round((seconds / sum) * 100)} %`, { "text-anchor": "end", class: "number" })]));
  const rows = sums.map(([kind, seconds]) => [WORDS[kind], ms(seconds), `${Math.round((seconds / sum) * 100)} %`]);
  return { svg, say: said, table: table(["part", "time", "share"], rows, said) };
}

// What happened that is worth a line: retries, dropped windows, lost losses, other cuts. The server says what the cut was before.
export function happened(run) {
  const found = [];
  if (run?.totals?.percent < 100) return found; // a sample does not show in which step it was
  for (const line of run?.lines ?? []) {
    if (line.retries) found.push(`Step ${grouped(line.step)}: memory ran out ${count(line.retries, "time")}; it ended in microbatches of ${line.microbatch_size}.`);
    if (line.applied === false) found.push(`Step ${grouped(line.step)} was dropped: its gradient is not finite.`);
    else if (line.loss === null) found.push(`Step ${grouped(line.step)}: the loss is no finite number.`);
    if (line.before) found.push(`Step ${grouped(line.step)}: microbatches of ${line.microbatch_size} instead of ${line.before}.`);
  }
  return found;
}

// The run in one row: how far it is, how long it takes yet, how well it does, how full the memory is, how fast it is.
export function headline(run) {
  const last = run?.lines.at(-1);
  if (!last) return [];
  const steps = run.settings.steps, limit = run.settings.memory, peak = Math.max(run.totals?.peak_bytes ?? 0, last.peak_bytes ?? 0);
  const validated = run.lines.findLast(({ validation }) => validation)?.validation.loss;
  const speeds = run.lines.map(({ per_second }) => per_second).filter((speed) => speed !== undefined).slice(-RECENT);
  return [
    { name: "Step", value: grouped(last.step), of: steps > 0 && `of ${grouped(steps)}`, share: steps > 0 && last.step / steps },
    { name: "Time left", value: timeLeft(run, last) },
    { name: "Loss", value: digits(last.loss), of: validated !== undefined && `validation ${digits(validated)}` },
    { name: "Memory, peak", value: peak ? bytes(peak) : "–", of: peak && (limit > 0 ? `of ${bytes(limit)}` : "no limit"), share: peak && limit > 0 && peak / limit },
    { name: "Speed", value: speeds.length ? digits(median(speeds)) : "–", of: speeds.length && `${unitOf([run])} a second` },
  ];
}

const RECENT = 20; // steps that a speed is the median of

const median = (values) => [...values].sort((one, other) => one - other)[Math.floor(values.length / 2)];

// What is left of the steps, each as long as the newest ones were.
function timeLeft(run, last) {
  const state = ending(run, last).split(" ")[0], steps = run.settings.steps;
  if (state !== "running") return { no: "–" }[state] ?? state;
  const times = run.lines.filter(({ timeline }) => timeline).slice(-RECENT).map(({ timeline: { wait, forward, backward, finish, optimizer } }) => wait + sumOf(forward) + sumOf(backward) + finish + optimizer);
  if (!(steps > 0) || !times.length) return "–";
  return duration(Math.max(0, steps - last.step) * median(times));
}

export function duration(seconds) {
  const minutes = Math.round(seconds / 60), hours = Math.floor(minutes / 60);
  return seconds < 99.5 ? `${Math.round(seconds)} s` : minutes < 100 ? `${minutes} min` : hours < 48 ? `${hours} h ${minutes % 60} min` : `${grouped(Math.round(minutes / 1440))} days`;
}

export const headlineOf = (run) => headline(run).map(({ name, value, of, share }) =>
  el("div", {}, el("dt", {}, name), el("dd", {}, el("strong", {}, escaped(value)), of ? ` ${escaped(of)}` : null,
    share ? el("progress", { max: 1, value: Math.min(1, share), "aria-label": name }) : null))).join("");

export function standing(run) {
  const last = run.lines.at(-1), steps = run.settings.steps, totals = run.totals ?? {};
  const wrong = [
    totals.unreadable && `${count(totals.unreadable, "line")} of metrics.jsonl cannot be read (the first: line ${grouped(totals.first_unreadable)})`,
    totals.odd && `${count(totals.odd, "value")} ${totals.odd === 1 ? "has" : "have"} a wrong type and ${totals.odd === 1 ? "is" : "are"} left out`,
  ].filter(Boolean).map((words) => `; ${words}`).join("");
  if (!last) return totals.percent < 100 ? `reading every step: ${totals.percent} %` : `waiting for its first step${wrong}`;
  const of = steps ? ` of ${grouped(steps)}` : "", now = `${ending(run, last)}: step ${grouped(last.step)}${of}, loss ${digits(last.loss)}`;
  if (totals.percent < 100) return `${now}; reading every step: ${totals.percent} %`;
  return `${now}, ${count(totals.retries ?? 0, "retry", "retries")}, ${count(totals.skipped ?? 0, "skipped window")}${wrong}`;
}

// A summary is of the step that it names; a run that goes on after it is running again. A killed one writes none.
function ending({ summary, silent }, last) {
  if (summary?.step === last.step) return summary.finished ? "finished" : `stopped by ${summary.stopped_by ?? "something unknown"}`;
  return silent ? `no news since ${new Date(silent * 1000).toLocaleString()}` : "running";
}

// The playground's four pictures: pure functions of what a run has told.

import { loop } from "./figures.js";
import { events, indexOf } from "./phases.js";
import { plot } from "./plot.js";
import { digits } from "./runs.js";
import { bytes, count, extent, figure, power, table, text } from "./svg.js";
import { legend, named, overflowSign, parts, tank, total } from "./tank.js";

export function loopPane(view) {
  const event = view.event ?? { phase: "begin", microbatch: -1 };
  const last = events(view.planned).length - 1;
  const index = { begin: 0, encode: 0, step: last }[event.phase] ?? Math.min(last, indexOf(event.microbatch, event.phase));
  const failed = {
    overflow: "What it asked for did not fit: the window ends here, and no weight has moved.",
    retry: "What it asked for did not fit: everything is put back as it was before the window.",
  }[view.kind];
  return loop(index, { microbatches: view.planned, now: { event, seen: view.seen, say: failed } });
}

export function tankPane(view) {
  const budget = view.ready?.budget ?? undefined;
  const shown = view.overflow ?? view.memory;
  const whole = view.steps.at(-1)?.whole;
  if (!shown) return { svg: figure(150, "Nothing yet", text(210, 75, "nothing measured yet", { "text-anchor": "middle", class: "quiet" })), say: "", table: "" };
  const list = parts(shown);
  const beside = whole ? parts({ ...whole.memory, total: whole.peak_bytes }) : null;
  const most = Math.max(total(list), budget ?? 0, beside ? total(beside) : 0) * 1.06;
  const scale = 190 / most;
  const over = budget !== undefined && total(list) > budget;
  const said = over
    ? `${need(shown)} ${bytes(total(list))}; the budget is ${bytes(budget)}.`
    : `${bytes(total(list))} at the peak of a step${budget === undefined ? "" : `, of ${bytes(budget)} allowed`}${whole ? `; the full batch takes ${bytes(total(beside))}` : ""}.${view.retry ? recovered(view) : ""}`;
  const svg = figure(
    260, said,
    tank(16, 20, beside ? 62 : 84, 200, list, { scale, capacity: budget, label: view.retry && view.overflow ? "the attempt" : "this run" }),
    beside ? tank(100, 20, 62, 200, beside, { scale, label: "full batch" }) : null,
    legend(beside ? 184 : 150, 40, list, { step: 28 }),
    over ? overflowSign(beside ? 184 : 150, 214, `needs ${bytes(total(list))}`) : null,
  );
  const rows = [...list, ["together", total(list)]].map(([role, size], line) =>
    [named(role), bytes(size), ...(beside ? [bytes(line < beside.length ? beside[line][1] : total(beside))] : [])]);
  return { svg, say: said, table: table(["part", "this run", ...(beside ? ["full batch"] : [])], rows, "Memory at the peak of a step") };
}

// What the run went through to be in its tank.
const recovered = ({ retry, settings, steps }) =>
  ` It overflowed in microbatches of ${settings.microbatch === "auto" ? retry.before : settings.microbatch}, and goes on in microbatches of ${steps.at(-1)?.microbatch_size ?? retry.after}.`;

const need = ({ rows }) => (rows ? `Microbatches of ${count(rows, "row")} need` : "This step needs");

const numbers = (view) => view.steps.map((step) => step.step + 1);

export function lossPane(view) {
  if (!view.steps.length) return empty("no step yet");
  const whole = view.steps.some((step) => step.whole) ? [{ name: "full batch", ys: view.steps.map((step) => step.whole?.loss) }] : [];
  const drawn = plot({ label: "Loss by step", xs: numbers(view), x: "step", y: "loss", zero: false, log: apart(view.steps), series: [{ name: "this run", ys: view.steps.map((step) => step.loss) }, ...whole], format: digits });
  const last = view.steps.at(-1);
  return { ...drawn, say: `Loss ${digits(last.loss)} at step ${last.step + 1}${last.whole ? `; trained on whole batches, ${digits(last.whole.loss)}` : ""}.` };
}

// A loss that runs away would press the other to the ground: then the scale is logarithmic.
function apart(steps) {
  const [low, high] = extent(steps.flatMap(({ loss, whole }) => [loss, whole?.loss]).filter((value) => value > 0 && Number.isFinite(value)));
  return high > 20 * low;
}

export function errorPane(view) {
  if (!view.steps.length) return empty("no gradient yet");
  const last = view.steps.at(-1);
  const drawn = plot({ label: "Relative error of the gradient by step", xs: numbers(view), x: "step", y: "relative error", log: true, format: power,
    series: [{ name: "this run", ys: view.steps.map((step) => step.error) }, { name: "full batch’s rounding", ys: view.steps.map((step) => step.own_error) }] });
  return { ...drawn, say: `A relative error of ${power(last.error)} against the full batch’s gradient in double precision; the full batch itself, in the run’s precision, ${power(last.own_error)}.` };
}

const empty = (words) => ({ svg: figure(150, words, text(210, 75, words, { "text-anchor": "middle", class: "quiet" })), say: "", table: "" });

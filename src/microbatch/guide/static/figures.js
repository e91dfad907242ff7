// The guide's figures: pure functions of what was chosen, of one index, and of what was measured.
// Each returns the picture, its table twin, and one sentence that says what is seen.

import { events, indexOf, say, split, tally } from "./phases.js";
import { plot } from "./plot.js";
import { written } from "./nodes.js";
import { CUTS, fits, HAS, LAST, need, stateAt, words } from "./stage.js";
import { SHAPES, stagePicture } from "./stage-picture.js";
import { bar, bytes, count, el, extent, figure, percent, power, ROLES, round, table, text } from "./svg.js";
import { legend, MIB, named, parts, tank, TANKS, total } from "./tank.js";

// -- memory -----------------------------------------------------------------------------------------------------------

// One step on the stage, in the shape that can be read at any width; the first one is in the page in both of its shapes.
export function stage({ cut, t, shapes = ["narrow"] }, measured) {
  const state = stateAt(cut, t, measured);
  const rows = CUTS.map((each) => [each, measured.reference.batch / each, bytes(need(each, measured)), fits(each, measured) ? "fits" : "out of memory", each === 1 ? "the same" : power(measured.shares.cuts[each].apart)]);
  return { svg: shapes.map((shape) => written(stagePicture(cut, t, measured, SHAPES[shape]))).join(""), say: words(state), state,
    table: table(["microbatches", "rows of each", "memory", `of ${HAS}`, "gradient apart"], rows, `One step on ${measured.reference.batch} rows`) };
}

// One series for the tank, its words and the section's: what is in memory at the peak, beside a gradient that is there.
// A batch may be cut, once memory has ended.
export function tankFigure({ batch, tank: capacity, cut = 1 }, measured) {
  const size = batch / cut, list = parts(measured.memory.window[size]);
  const sum = total(list), room = capacity * MIB, over = sum > room;
  const scale = tankScale(measured);
  const rows = count(size, "row"), whole = cut === 1 ? `${rows} at once` : `${cut} × ${rows}`;
  const [needs, takes] = size === 1 && cut === 1 ? ["needs", "takes"] : ["need", "take"];
  // The second number is the stage’s.
  const first = cut === 1 ? ` Before there is a gradient: ${bytes(measured.memory.alone[size].total)}.` : "";
  const said = over
    ? `Out of memory: ${whole} ${needs} ${bytes(sum)}, and the tank holds ${capacity} MiB.${first}`
    : `${whole} ${takes} ${bytes(sum)} of the tank’s ${capacity} MiB.${first}${cut > 1 ? ` The batch is still ${batch} rows.` : ""}`;
  const rim = TANK.bottom - room * scale, level = TANK.bottom - sum * scale;
  const svg = figure(
    310,
    said,
    tank(TANK.left, TANK.bottom - 236, TANK.width, 236, list, { scale, capacity: room, label: whole }),
    el("rect", { class: "grip", "data-drag": "batch", x: TANK.left - 6, y: level - 14, width: TANK.width + 12, height: TANK.bottom - level + 14 }),
    el("g", { class: "handle", "data-drag": "tank" }, el("rect", { class: "grip", x: TANK.left - 12, y: rim - 8, width: TANK.width + 24, height: 16 }), el("circle", { cx: TANK.left + TANK.width + 18, cy: rim, r: 9 }),
      el("path", { d: `M${TANK.left + TANK.width + 14} ${round(rim - 1.5)}l4 -4l4 4M${TANK.left + TANK.width + 14} ${round(rim + 1.5)}l4 4l4 -4` }),
      el("rect", { class: "grip", x: TANK.left + TANK.width - 2, y: rim - 20, width: 40, height: 40 })),
    text(190, 34, bytes(sum), { class: "number big" }),
    text(190, 54, `in a tank of ${capacity} MiB`, { class: "quiet" }),
    legend(190, 78, list, { step: 28 }),
    over ? el("g", { class: "plate" }, el("rect", { x: 196, y: 228, width: 222, height: 54, rx: 10 }),
      text(307, 251, "Out of memory", { class: "shout", "text-anchor": "middle" }),
      text(307, 272, `needs ${bytes(sum)}, has ${capacity}`, { "text-anchor": "middle" })) : null,
  );
  const cells = [...list, ["together", sum]].map(([role, bytesOf]) => [named(role), bytes(bytesOf)]);
  return { svg, say: said, over, table: table(["part", "at the peak"], cells, whole) };
}

export const TANK = { left: 30, width: 112, bottom: 274 };

// The size to which a level was drawn: a quarter of the way is enough.
export function drawnTo(from, level, sizes, measured) {
  const at = (index) => measured.memory.window[sizes[index]].total, near = (low, share) => at(low) + (at(low + 1) - at(low)) * share;
  let to = from;
  while (to < sizes.length - 1 && level > near(to, 0.25)) to += 1;
  while (to <= from && to > 0 && level < near(to - 1, 0.75)) to -= 1;
  return to;
}

export const tankScale = ({ memory }) => 236 / Math.max(total(parts(memory.window[64])), TANKS.high * MIB);

export function memoryFigure({ batch, microbatch }, measured) {
  const { alone, window: cut } = measured.memory;
  const size = Math.min(batch, microbatch);
  const whole = parts(alone[batch]), small = parts(size === batch ? alone[batch] : cut[size]);
  const scale = 200 / total(parts(alone[64]));
  const fewer = (role) => (Object.fromEntries(whole)[role] / Object.fromEntries(small)[role]).toFixed(1);
  const ratio = (total(whole) / total(small)).toFixed(1);
  const said =
    size === batch
      ? `One microbatch of ${size} is the whole batch: ${bytes(total(whole))}.`
      : `Activations fall ${fewer("activations")} times, the total ${ratio} times: what does not depend on rows stays.`;
  const svg = figure(
    280,
    said,
    tank(10, 14, 66, 206, whole, { scale, label: `${batch} at once` }),
    tank(98, 14, 66, 206, small, { scale, label: `${Math.ceil(batch / size)} × ${size}` }),
    text(43, 262, bytes(total(whole)), { "text-anchor": "middle", class: "number" }),
    text(131, 262, bytes(total(small)), { "text-anchor": "middle", class: "number" }),
    text(416, 24, `${Math.ceil(batch / size)} × ${size}`, { "text-anchor": "end", class: "quiet" }),
    legend(184, 40, small),
    text(184, 222, `activations ÷ ${fewer("activations")}`, { class: "label activations" }),
    text(184, 246, `total ÷ ${ratio}`, { class: "number" }),
  );
  const rows = whole.map(([role, bytesOf], index) => [named(role), bytes(bytesOf), bytes(small[index][1])]);
  rows.push(["together", bytes(total(whole)), bytes(total(small))]);
  return { svg, say: said, table: table(["part", `${batch} at once`, `${Math.ceil(batch / size)} × ${size}`], rows, "Memory at the peak of a step") };
}

// -- the split and the loop -------------------------------------------------------------------------------------------

export function splitFigure({ batch, microbatch }) {
  const sizes = split(batch, microbatch);
  const columns = Math.min(8, Math.ceil(sizes.length / 8));
  const lines = Math.ceil(sizes.length / columns);
  const width = 412 / columns;
  const numberWidth = 26;
  const perLine = Math.min(microbatch, 32);
  const cell = Math.min(22, (width - numberWidth - 10) / perLine);
  const deep = Math.ceil(microbatch / perLine) * cell + 9;
  const last = sizes.at(-1);
  const said = `${count(batch, "row")} in microbatches of ${microbatch}: ${count(sizes.length, "microbatch", "microbatches")}` +
    (last < microbatch ? `, the last with ${count(last, "row")}.` : sizes.length > 1 ? ", all of one size." : ".");
  const drawn = sizes.map((size, index) => {
    const x = 4 + Math.floor(index / lines) * width, y = 4 + (index % lines) * (deep + 6);
    const wide = Math.min(size, perLine) * cell + 6;
    return el("g", { class: size < microbatch ? "microbatch short" : "microbatch" },
      text(x + numberWidth - 7, y + deep / 2 + 4, index + 1, { "text-anchor": "end", class: "number" }),
      el("rect", { x: x + numberWidth, y, width: wide, height: Math.ceil(size / perLine) * cell + 6, rx: 4 }),
      Array.from({ length: size }, (_, row) =>
        el("rect", { class: "row", x: x + numberWidth + 3 + (row % perLine) * cell + cell * 0.12,
          y: y + 3 + Math.floor(row / perLine) * cell + cell * 0.12, width: cell * 0.76, height: cell * 0.76 })));
  });
  const high = lines * (deep + 6) + 34;
  const svg = figure(high, said, drawn,
    text(4, high - 8, `⌈${batch} / ${microbatch}⌉ = ${sizes.length}`, { class: "number big" }),
    last < microbatch ? text(416, high - 8, `the last: ${count(last, "row")}`, { "text-anchor": "end", class: "number" }) : null);
  return { svg, say: said, table: table(["microbatch", "rows"], sizes.map((size, index) => [index + 1, size]), said) };
}

// Of a real run, `now` is what happened last, and what had happened in its step by then.
export function loop(index, { microbatches, now } = { microbatches: 4 }) {
  const list = events(microbatches);
  const at = Math.max(0, Math.min(index, list.length - 1));
  const event = now?.event ?? list[at];
  const seen = now?.seen ?? tally(list, at);
  const stepped = event.phase === "step";
  const grown = stepped ? microbatches : seen.backwards;
  const width = 408 / microbatches;
  const gap = Math.min(6, width * 0.18);
  const boxes = Array.from({ length: microbatches }, (_, number) => {
    const state = number === event.microbatch ? "now" : number < seen.backwards || stepped ? "done" : "waiting";
    const x = 6 + number * width;
    return el("g", { class: `microbatch ${state}` },
      el("rect", { x, y: 10, width: width - gap, height: 34, rx: 4 }),
      width > 16 ? text(x + (width - gap) / 2, 32, number + 1, { "text-anchor": "middle", class: "number" }) : null);
  });
  const current = 6 + Math.max(0, Math.min(event.microbatch, microbatches - 1)) * width + (width - gap) / 2;
  const full = { forward: 118 }[event.phase] ?? 0;
  const segment = 118 / microbatches;
  const grownName = `gradient ${grown}/${microbatches}`;
  const said = now?.say ?? say(event, microbatches);
  const svg = figure(
    268,
    said,
    boxes,
    ["take", "forward", "encode"].includes(event.phase)
      ? el("path", { class: "arrow", d: `M${round(current)} 48V64H210V80`, "marker-end": "url(#head)" }) : null,
    el("rect", { class: "slot", x: 20, y: 84, width: 72, height: 120, rx: 4 }),
    bar(21, 203 - full, 70, full, "activations"),
    text(56, 224, "activations", { "text-anchor": "middle", class: "label activations" }),
    el("rect", { class: stepped ? "model moved" : "model", x: 140, y: 84, width: 140, height: 120, rx: 8 }),
    bar(152, 118, 116, 30, "parameters"),
    text(210, 108, "parameters", { "text-anchor": "middle", class: "label parameters" }),
    text(210, 169, stepped ? "moved, once" : "frozen", { "text-anchor": "middle" }),
    stepped ? null : el("path", { class: "lock", d: "M204 186v-4a6 6 0 0 1 12 0v4M201 186h18v12h-18z" }),
    stepped ? el("path", { class: "arrow thick", d: "M326 144H288", "marker-end": "url(#head)" }) : null,
    event.phase === "forward" ? el("path", { class: "arrow", d: "M136 144H98", "marker-end": "url(#head)" }) : null,
    event.phase === "backward" ? el("path", { class: "arrow", d: "M284 144H322", "marker-end": "url(#head)" }) : null,
    el("rect", { class: "slot", x: 328, y: 84, width: 72, height: 120, rx: 4 }),
    bar(329, 203 - grown * segment, 70, grown * segment, "gradients"),
    microbatches <= 32 ? Array.from({ length: microbatches - 1 }, (_, line) =>
      el("line", { class: "tick", x1: 329, x2: 399, y1: 203 - (line + 1) * segment, y2: 203 - (line + 1) * segment })) : null,
    text(Math.min(364, 418 - grownName.length * 4.6), 224, grownName, { "text-anchor": "middle", class: "label gradients" }),
    text(210, 258, `${count(seen.forwards, "forward")} · ${count(seen.backwards, "backward")} · ${count(seen.steps, "step")}`,
      { "text-anchor": "middle", class: "number" }),
  );
  const rows = list.map((each, number) => [number, each.phase, each.microbatch >= 0 && each.microbatch < microbatches ? each.microbatch + 1 : "–",
    number === at ? "now" : number < at ? "done" : "waiting"]);
  return { svg, say: said, event, length: list.length, table: table(["event", "phase", "microbatch", "state"], rows, "The events of one step") };
}

export { indexOf };

// -- the mathematics --------------------------------------------------------------------------------------------------

export const RULES = { right: "all tokens", none: "nothing", means: "number of microbatches" };

// What one token of each microbatch weighs in the gradient.
export function weights(lengths, rule) {
  const tokens = lengths.reduce((sum, length) => sum + length, 0);
  const each = {
    right: () => 1 / tokens,
    none: (length) => 1 / length,
    means: (length) => 1 / (lengths.length * length),
    weighted: (length) => (length / tokens) * (1 / length),
  }[rule];
  return lengths.map(each);
}

// One number of the gradient, as it was measured in four microbatches: each one’s mean, as wide as it has tokens. Of each
// mean the share that a rule adds is filled, and the shares are stacked beside the whole batch’s number.
export function mathematics({ lengths, rule }, measured) {
  const tokens = lengths.reduce((sum, length) => sum + length, 0), { shares } = measured.shares.cuts[lengths.length];
  const entry = measured.shares.whole.indexOf(extent(measured.shares.whole)[1]);
  const means = shares.map((each) => each[entry] * shares.length);
  const whole = means.reduce((sum, mean, index) => sum + (mean * lengths[index]) / tokens, 0);
  const factors = weights(lengths, rule).map((weight, index) => weight * lengths[index]);
  const parts = means.map((mean, index) => mean * factors[index]);
  const stack = parts.reduce((sum, part) => sum + part, 0), ratio = stack / whole, off = Math.abs(ratio - 1);
  const even = lengths.every((length) => length === lengths[0]);
  const said = {
    right: "The sum, divided by all tokens: the shares stack up to the whole batch’s number, whatever the lengths.",
    none: `Not divided: the stack is ${ratio.toFixed(2)} times as tall as the whole batch’s.`,
    means: even ? "Means, divided by the number of microbatches: the same only while all of them have equally many tokens."
      : off < 5e-4 ? "Divided by the number of microbatches: right here by chance."
      : `A mean of means: ${percent(off)} off. It counts a token of a short microbatch for more than one of a long one.`,
  }[rule];
  const undivided = means.reduce((sum, mean) => sum + mean, 0), bottom = 268, scale = 56 / (extent(means)[1] * 0.61), unit = 150 / Math.max(20, tokens), high = bottom - undivided * scale;
  let left = 14, level = bottom;
  const bars = means.map((mean, index) => {
    const width = 10 + lengths[index] * unit, tall = mean * scale, x = left;
    left += width + 6;
    return [el("rect", { class: "mean", x, y: bottom - tall, width, height: tall }), bar(x, bottom - parts[index] * scale, width, parts[index] * scale, "gradients"),
      text(x + width / 2, bottom + 18, index + 1, { "text-anchor": "middle", class: "number" })];
  });
  const stacked = parts.map((part, index) => {
    level -= part * scale;
    const tall = part * scale;
    return [bar(290, level, 70, tall, "gradients"), tall > 18 ? [el("circle", { class: "disc", cx: 325, cy: level + tall / 2, r: 9 }), text(325, level + tall / 2 + 5, index + 1, { "text-anchor": "middle", class: "number small" })] : null];
  });
  const svg = figure(322, said,
    text(8, 20, "outline: mean; width: tokens", { class: "quiet" }), text(325, 20, "their shares, stacked", { "text-anchor": "middle", class: "quiet" }),
    el("path", { class: "axis", d: `M8 ${bottom}H236M282 ${bottom}H410` }), bars, stacked,
    el("rect", { class: off < 1e-9 ? "goal met" : "goal", x: 286, y: bottom - whole * scale, width: 78, height: whole * scale }),
    el("path", { class: "arrow", d: "M240 240H274", "marker-end": "url(#head)" }),
    rule === "none" ? null : [el("path", { class: "rim", d: `M286 ${round(high)}H364` }), text(325, high + 18, `not divided: × ${(undivided / whole).toFixed(2)}`, { "text-anchor": "middle", class: "quiet" })],
    text(325, bottom - Math.max(stack, whole) * scale - 8, `× ${ratio.toFixed(2)}`, { "text-anchor": "middle", class: off < 1e-9 ? "number strong" : "number strong bad" }),
    text(14, bottom + 44, `${lengths.join(" + ")} = ${tokens} tokens`, { class: "quiet" }),
    text(325, bottom + 18, "dashed: whole batch", { "text-anchor": "middle", class: "quiet" }));
  const rows = lengths.map((length, index) => [index + 1, length, power(means[index]), `× ${power(factors[index])}`, power(parts[index])]);
  rows.push(["together", tokens, power(whole), `× ${power(ratio)}`, power(stack)]);
  return { svg, say: said, ratio, table: table(["microbatch", "tokens", "mean", "share", "added"], rows, `One number of the gradient, divided by ${RULES[rule]}`) };
}

// -- what differs -----------------------------------------------------------------------------------------------------

export const VIEWS = { norm: "normalisation", pairs: "contrastive loss", precision: "precision of the sum", speed: "speed by microbatch size" };

export const differences = ({ view }, measured) => ({ norm, pairs: coupling, precision, speed: pace })[view](measured);

// Microbatches of this many rows are spoken of; all of them are drawn.
const SPOKEN = 8;

function against({ sizes }, named, label, said) {
  const of = sizes.at(-1), at = sizes.indexOf(SPOKEN);
  const drawn = plot({ label, xs: sizes, x: `rows of a microbatch, of a batch of ${of}`, y: "relative error", log: true,
    series: named.map(([name, { errors }]) => ({ name, ys: errors })), format: power });
  return { ...drawn, say: `${said(...named.map(([, { errors }]) => errors[at]))} at ${SPOKEN} rows of ${of}. All ${of} at once are the batch itself.` };
}

const norm = ({ batch_norm, batch_norm_exact, group_norm }) =>
  against(batch_norm, [["BatchNorm", batch_norm], ["exact mode", batch_norm_exact], ["GroupNorm", group_norm]], "Relative error of the gradient, by microbatch size",
    (batch, exact, group) => `With BatchNorm the gradient is ${percent(batch)} off, in exact mode ${power(exact)}, with GroupNorm ${power(group)},`);

const coupling = ({ pairs, pairs_coupled }) =>
  against(pairs, [["cut plainly", pairs], ["coupled step", pairs_coupled]], "Relative error of a contrastive loss’s gradient, by microbatch size",
    (plain, coupled) => `Cut plainly, the gradient is ${percent(plain)} off, by the coupled step ${power(coupled)},`);

function precision({ sums }) {
  const drawn = plot({ label: "Relative error of a sum of gradients of bfloat16 weights", xs: sums.counts, x: "gradients added", y: "relative error", log: true,
    series: [{ name: "added in bfloat16", ys: sums.bfloat16 }, { name: "added in float32", ys: sums.float32 }], format: power });
  return { ...drawn, say: `${sums.counts.at(-1)} gradients of bfloat16 weights: added in bfloat16 ${percent(sums.bfloat16.at(-1))} off, in float32 ${power(sums.float32.at(-1))}.` };
}

function pace({ speed }) {
  const best = speed.per_second.indexOf(extent(speed.per_second)[1]);
  const drawn = plot({ label: "Rows a second of one step, by microbatch size", xs: speed.sizes, x: "rows of a microbatch", y: "rows a second",
    series: [{ name: "reference transformer", ys: speed.per_second }], format: (value) => value.toFixed(0) });
  return { ...drawn, say: `Fastest here in microbatches of ${count(speed.sizes[best], "row")}: ${speed.per_second[best].toFixed(0)} rows a second; one at a time, ${speed.per_second[0].toFixed(0)}.` };
}

// -- when -------------------------------------------------------------------------------------------------------------

export const QUESTIONS = [
  { ask: "Does the batch fit in memory?", no: "Accumulate: this is what it is for." },
  { ask: "Several GPUs: do they wait?", yes: "Accumulate: one exchange a step." },
  { ask: "Would less noise help?", yes: "Accumulate to a larger batch.", no: "Do not: it would only take time." },
];

// The path is the list of answers so far, each true for yes.
export function decision({ path }) {
  const drawn = [];
  let open = true;
  QUESTIONS.forEach((question, line) => {
    const y = 8 + line * 86;
    const answer = path[line];
    const reached = open;
    const leaves = ["yes", "no"].filter((side) => question[side]);
    drawn.push(el("g", { class: reached ? "question reached" : "question" },
      el("rect", { x: 4, y, width: 236, height: 38, rx: 19 }), text(122, y + 24, question.ask, { "text-anchor": "middle" })));
    leaves.forEach((side, number) => {
      const chosen = reached && answer === (side === "yes");
      const top = y - 4 + number * 54;
      drawn.push(el("path", { class: chosen ? "arrow thick" : "arrow faint", d: number ? `M122 ${y + 38}V${top + 22}H262` : `M240 ${y + 19}H262`, "marker-end": "url(#head)" }));
      drawn.push(text(number ? 132 : 254, number ? top + 16 : y + 9, side, { class: "quiet small", "text-anchor": number ? null : "middle" }));
      drawn.push(el("g", { class: chosen ? "answer reached" : "answer" }, el("rect", { x: 268, y: top, width: 148, height: 46, rx: 6 }), lines(342, top + 19, question[side])));
    });
    const on = { yes: question.no && !question.yes, no: question.yes && !question.no };
    if (on.yes || on.no) {
      const passed = reached && answer === Boolean(on.yes);
      drawn.push(el("path", { class: passed ? "arrow thick" : "arrow faint", d: `M122 ${y + 38}V${y + 82}`, "marker-end": "url(#head)" }));
      drawn.push(text(132, y + 64, on.yes ? "yes" : "no", { class: "quiet small" }));
    }
    open = reached && answer !== undefined && !question[answer ? "yes" : "no"];
  });
  const end = path.map((answer, line) => QUESTIONS[line]?.[answer ? "yes" : "no"]).find(Boolean);
  const said = end ?? `Question ${path.length + 1} of ${QUESTIONS.length}: ${QUESTIONS[path.length].ask}`;
  const rows = QUESTIONS.map((question) => [question.ask, question.yes ?? "the next question", question.no ?? "the next question"]);
  return { svg: figure(286, said, drawn), say: said, end, table: table(["question", "yes", "no"], rows, "Whether to accumulate") };
}

// Two lines of a label, broken where it is nearest to the middle.
function lines(x, y, words) {
  const spaces = [...words.matchAll(/ /g)].map((match) => match.index);
  const at = spaces.reduce((best, space) => (Math.abs(space - words.length / 2) < Math.abs(best - words.length / 2) ? space : best), spaces[0]);
  return [text(x, y, words.slice(0, at), { "text-anchor": "middle", class: "small" }), text(x, y + 17, words.slice(at + 1), { "text-anchor": "middle", class: "small" })];
}

// -- all of them, as they stand in the page before anyone touches them ------------------------------------------------

export const START = {
  hero: { cut: 4, t: LAST, shapes: ["wide", "narrow"] },
  tank: { batch: 16, tank: 96 },
  split: { batch: 50, microbatch: 8 },
  loop: { cut: 4, t: 258 },
  mathematics: { lengths: [4, 4, 4, 4], rule: "right" },
  code: { cut: 4, t: 60 },
  memory: { batch: 64, microbatch: 8 },
  differences: { view: "norm" },
  decision: { path: [] },
};

export const FIGURES = {
  hero: stage,
  tank: tankFigure,
  split: splitFigure,
  loop: stage,
  mathematics,
  code: stage,
  memory: memoryFigure,
  differences,
  decision,
};

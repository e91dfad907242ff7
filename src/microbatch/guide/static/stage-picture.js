// The stage's picture: a tree of one shape for each cut, so that from moment to moment only attributes change.

import { node } from "./nodes.js";
import { HAS, LAST, LIMIT, stateAt, wholeCurve, words } from "./stage.js";
import { bytes, roleClass, round } from "./svg.js";

const WIDE = {
  name: "wide", width: 640, height: 392, edge: 16, tiles: [8, 44], gap: 12,
  tank: [16, 104, 112, 132], model: [206, 104, 36, 132, 14], bars: [434, 104, 190, 132], trace: [16, 378, 608, 58], plate: [236, 54],
};
const NARROW = {
  name: "narrow", width: 360, height: 348, edge: 8, tiles: [6, 40], gap: 6,
  tank: [10, 88, 78, 104], model: [116, 88, 26, 104, 9], bars: [266, 88, 88, 104], trace: [8, 334, 344, 52], plate: [228, 54],
};
export const SHAPES = { wide: WIDE, narrow: NARROW };
const LAYERS = 4; // of the reference model

const tenth = (value) => Math.round(value * 10) / 10; // of a curve with many points, which is there three times
const rect = (x, y, width, height, more = {}) => node("rect", { x, y, width: Math.max(0, width), height: Math.max(0, height), ...more });
const label = (x, y, written, more = {}) => node("text", { x, y, ...more }, written);
const PATTERNS = { "optimizer state": "dots", gradients: "hatch", activations: "stripes", overflow: "cross" };

// A filled box of a role, in its colour and its pattern.
const filled = (role, x, y, width, height, more = {}) =>
  node("g", { class: `role ${roleClass(role)}`, ...more }, rect(x, y, width, height, { class: "fill" }),
    PATTERNS[role] ? rect(x, y, width, height, { fill: `url(#${PATTERNS[role]})` }) : null);

export function stagePicture(cut, t, measured, shape) {
  const state = stateAt(cut, t, measured);
  const said = words(state);
  return node("svg", { viewBox: `0 0 ${shape.width} ${shape.height}`, class: `stage ${shape.name}`, role: "img", "aria-label": said },
    tiles(state, shape), road(state, shape), tankOf(state, shape), model(state, shape), gradient(state, shape), trace(state, shape, measured), plate(state, shape));
}

// -- the batch --------------------------------------------------------------------------------------------------------

const tileOf = ({ cut }, { width, edge, gap }, index) => {
  const room = (width - 2 * edge - gap * (cut - 1)) / cut;
  return [edge + index * (room + gap), room];
};

function tiles(state, shape) {
  const { cut, rows, index, done, phase } = state, [top, height] = shape.tiles;
  const size = rows / cut, columns = Math.ceil(size / 4);
  return node("g", {}, Array.from({ length: cut }, (_, number) => {
    const [x, room] = tileOf(state, shape, number), cell = (room - 6) / columns;
    const now = number === index && !state.agreed && phase !== "begin";
    const line = (height - 8) / 4, wide = Math.max(2, cell - 1.6);
    // A line of rows is a dashed stroke.
    const d = [0, 1, 2, 3].map((each) => `M${round(x + 3.8)} ${round(top + 4 + (each + 0.45) * line)}h${round(columns * cell - 1.6)}`).join("");
    const used = number < done && !now;
    return node("g", { class: `microbatch${now ? " now" : used ? " done" : ""}`, "data-microbatch": number, transform: now ? `translate(0 ${round(4 * state.take)})` : undefined },
      rect(x, top, room, height, { rx: 6 }), node("path", { class: "rows", d, "stroke-width": line - 1.8, "stroke-dasharray": `${round(wide)} ${round(cell - wide)}`, opacity: used ? 0.35 : undefined }));
  }));
}

// The way of the microbatch's rows into the model.
function road(state, shape) {
  const [x, room] = tileOf(state, shape, Math.max(0, state.index)), [left, top, , height] = shape.model;
  const from = x + room / 2, y = shape.tiles[0] + shape.tiles[1] + 6;
  const shown = state.index >= 0 && !state.agreed && state.phase !== "add" ? 1 - state.backward : 0;
  return node("path", { class: "road", d: `M${round(from)} ${y}C${round(from)} ${top - 16} ${left - 30} ${y + 8} ${left - 8} ${top + height / 2}`,
    pathLength: 1, "stroke-dasharray": 1, "stroke-dashoffset": 1 - state.take, opacity: shown * 0.6 });
}

// -- the memory -------------------------------------------------------------------------------------------------------

function tankOf(state, shape) {
  const [x, y, width, height] = shape.tank, over = state.overflow !== null;
  const shaken = over ? Math.sin(state.overflow * 26) * 4 * (1 - state.overflow) : 0;
  let level = y + height;
  const roles = ["parameters", "optimizer state", "gradients", "activations", "other"];
  const parts = roles.map((role) => {
    const high = (state.memory[role] / LIMIT) * height;
    level -= high;
    return filled(role, x + 3, level, width - 6, high);
  });
  const spilled = over ? 12 * Math.min(1, state.overflow * 2) : 0;
  const center = x + width / 2;
  return node("g", { transform: shaken ? `translate(${round(shaken)} 0)` : undefined }, parts, filled("overflow", x + 3, y - spilled, width - 6, spilled),
    node("path", { class: "tank", d: `M${x} ${y}V${y + height}H${x + width}V${y}` }),
    node("path", { class: over ? "rim over" : "rim", d: `M${x - 6} ${y}H${x + width + 6}` }),
    label(center, y - 17, "memory", { class: "quiet" }),
    label(center, y + height + 20, over ? `${shape.name === "wide" ? "needs " : ""}${bytes(state.need)}` : bytes(state.total), { class: over ? "number strong bad" : "number strong" }),
    label(center, y + height + 38, `of ${HAS}`, { class: "quiet" }));
}

function trace(state, shape, measured) {
  const [x, bottom, width, height] = shape.trace;
  const most = LIMIT * 1.18, up = (value) => bottom - (Math.min(value, most) / most) * height;
  const points = wholeCurve(state.cut, measured).map(([share, value]) => [tenth(x + share * width), tenth(up(value))]);
  const now = tenth(x + (state.seconds / state.end) * width), level = tenth(up(state.total));
  const line = (list) => `M${list.map((point) => point.join(" ")).join("L")}`;
  const whole = [[x, points[0][1]], ...points, [x + width, points.at(-1)[1]]], past = [...whole.filter(([left]) => left < now), [now, level]];
  return node("g", { class: "trace" },
    node("path", { class: "ahead", d: state.t < LAST ? line(whole) : "" }),
    node("path", { class: "area", d: `${line(past)}V${bottom}H${x}Z` }), node("path", { class: "past", d: line(past) }),
    node("path", { class: "limit", d: `M${x} ${round(up(LIMIT))}H${x + width}` }),
    label(x + width, up(LIMIT) - 6, `limit: ${HAS}`, { class: "end small bad" }),
    label(x, bottom - height - 1, "memory over time", { class: "start small quiet" }),
    node("path", { class: "axis", d: `M${x} ${bottom}H${x + width}` }),
    node("circle", { class: "now", cx: now, cy: level, r: 5.5 }),
    rect(x - 4, bottom - height - 6, width + 8, height + 20, { class: "scrub", "data-scrub": "" }));
}

// -- the model and its gradient ---------------------------------------------------------------------------------------

function model(state, shape) {
  const [left, top, width, height, gap] = shape.model;
  const center = left + (LAYERS * width + (LAYERS - 1) * gap) / 2;
  const layers = Array.from({ length: LAYERS }, (_, layer) => {
    const x = left + layer * (width + gap);
    const full = Math.max(0, Math.min(1, state.forward * LAYERS - layer)) * (1 - Math.max(0, Math.min(1, state.backward * LAYERS - (LAYERS - 1 - layer))));
    const high = (height - 8) * full;
    const weight = [0.55, 0.35, 0.7, 0.45][layer] + 0.17 * state.stepped * (layer % 2 ? -1 : 1);
    return node("g", {}, rect(x, top, width, height, { rx: 7, class: "layer" }), filled("activations", x + 4, top + height - 4 - high, width - 8, high),
      rect(x, top + height + 8, width, 7, { rx: 3.5, class: "groove" }), rect(x, top + height + 8, width * weight, 7, { rx: 3.5, class: "weight" }));
  });
  const doing = state.overflow !== null ? "" : state.phase === "forward" ? "forward →" : state.phase === "backward" ? "← backward" : `model: ${LAYERS} layers`;
  const moved = state.stepped > 0;
  return node("g", { class: "network" }, layers,
    label(center, top - 17, doing, { class: { forward: "label activations", backward: "label gradients" }[state.phase] ?? "quiet" }),
    label(center + 10, top + height + 38, moved ? "weights move" : "weights frozen", { class: "label parameters" }),
    node("path", { class: "padlock", d: padlock(center - (shape.name === "wide" ? 60 : 64), top + height + 33, moved) }));
}

const padlock = (x, y, open) => `M${x - 6} ${y - 4}h12v9h-12zM${x - 3.5} ${y - 4}v-3a3.5 3.5 0 0 1 7 0${open ? "" : "v3"}`;

function gradient(state, shape) {
  const [left, top, width, height] = shape.bars, middle = top + height / 2;
  const { sums, whole, flying, fly } = state, step = width / whole.length;
  const scale = (height / 2 - 2) / Math.max(...whole.map(Math.abs));
  const [start, , layer, , gap] = shape.model, from = start + LAYERS * layer + (LAYERS - 1) * gap + 4;
  const at = (value) => (value > 0 ? middle - value * scale : middle);
  const along = fly < 0.5 ? 2 * fly * fly : 1 - 2 * (1 - fly) ** 2;
  const bars = whole.map((goal, index) => {
    const x = left + index * step + 2, wide = step - 4;
    const share = flying[index] ?? 0;
    const off = fly > 0 && fly < 1;
    return node("g", {}, filled("gradients", x, at(sums[index]), wide, Math.abs(sums[index]) * scale),
      rect(x - 1, at(goal), wide + 2, Math.abs(goal) * scale, { class: state.agreed ? "goal met" : "goal" }),
      filled("gradients", from + (x - from) * along, at(share), off ? wide * (0.4 + 0.6 * along) : 0, off ? Math.max(2, Math.abs(share) * scale) : 0, { opacity: round(0.95 - 0.6 * along) }));
  });
  const center = left + width / 2, narrow = shape.name === "narrow";
  const drops = [0, 1, 2].map((drop) => {
    const part = Math.max(0, Math.min(1, state.stepped * 1.4 - drop * 0.15));
    return node("circle", { class: "drop", cx: left - 4 + (from - left) * part, cy: middle - 20 + drop * 20, r: 4, opacity: state.stepped > 0 && part < 1 ? 1 : 0 });
  });
  return node("g", {}, node("path", { class: "axis", d: `M${left - 4} ${middle}H${left + width + 4}` }), bars, drops,
    label(center, top - 17, narrow ? "gradient" : "7 numbers of the gradient", { class: "quiet" }),
    label(center, top + height + 20, state.agreed ? "✓ the same" : `${state.done} of ${state.cut} added`, { class: "label gradients" }),
    label(center, top + height + 38, narrow ? "dashed: whole" : "dashed: the whole batch’s", { class: "quiet" }));
}

function plate(state, shape) {
  const [left, top, width, height, gap] = shape.model, [wide, high] = shape.plate;
  const over = state.overflow !== null;
  const center = left + (LAYERS * width + (LAYERS - 1) * gap) / 2, y = top + height / 2;
  return node("g", { class: "plate", opacity: over ? Math.min(1, state.overflow * 3) : 0 },
    rect(center - wide / 2, y - high / 2, wide, high, { rx: 10 }),
    label(center, y - 4, over ? "Out of memory" : "", { class: "shout" }),
    label(center, y + 16, over ? `needs ${bytes(state.need)}, has ${HAS}` : ""));
}

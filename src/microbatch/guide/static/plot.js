// One kind of chart: series over positions, on a plain or a logarithmic scale. Lines differ in dash and mark, not colour.

import { el, extent, figure, power, round, table, text } from "./svg.js";

const SMALLEST = 1e-300; // of what a logarithm is drawn of: below, powers of ten are zero
const LEFT = 12, RIGHT = 408, TOP = 52, BOTTOM = 214;

const MARKS = [
  (x, y) => el("circle", { cx: x, cy: y, r: 4.5 }),
  (x, y) => el("path", { d: `M${x} ${y - 6}l6 6l-6 6l-6 -6z` }),
  (x, y) => el("path", { d: `M${x} ${y - 6}l5.5 10h-11z` }),
  (x, y) => el("path", { d: `M${x - 4.5} ${y - 4.5}h9v9h-9z` }),
  (x, y) => el("circle", { class: "hollow", cx: x, cy: y, r: 4 }),
  (x, y) => el("path", { class: "hollow", d: `M${x - 4} ${y - 4}h8v8h-8z` }),
];

// `most` marks are drawn: of a long series each point would hide the next. A series may say which `look` it has, so that
// it has the same in every chart; else it is its number.
export function plot({ label, xs, x, y, series, log = false, format = String, evenly = true, limit, limitName, zero = true, most = 24, height = 276 }) {
  const drawable = (value) => Number.isFinite(value) && (!log || value > SMALLEST);
  const values = series.flatMap(({ ys }) => ys).filter(drawable);
  if (limit !== undefined) values.push(limit);
  const [low, high] = log
    ? logarithmic(values)
    : linear(values, zero);
  const span = high - low || 1;
  const heights = log ? decades(low, high) : multiples(low, high, 4);
  const levels = heights.map((value) => (log ? exponent(value) : tick(value, span / 4)));
  const axis = LEFT + 34 + Math.max(0, extent(levels.map(({ length }) => length))[1] * 9.7 - 42); // long numbers take room
  const across = (index) => {
    const share = evenly ? index / Math.max(1, xs.length - 1) : (xs[index] - xs[0]) / Math.max(1e-9, xs.at(-1) - xs[0]);
    return axis + 10 + share * (RIGHT - axis - 24);
  };
  const up = (value) => BOTTOM - (((log ? Math.log10(Math.max(value, 10 ** low)) : value) - low) / span) * (BOTTOM - TOP);
  const grid = heights.map((value, index) => [
    el("line", { class: "grid", x1: axis, x2: RIGHT, y1: up(value), y2: up(value) }),
    text(axis - 4, up(value) + 4, levels[index], { "text-anchor": "end", class: "quiet small" }),
  ]);
  const upright = text(axis, TOP - 11, `↑ ${y}`, { class: "quiet small" });
  const ticks = below(xs).map(([index, value]) => text(across(index), BOTTOM + 18, value < 10_000 ? value : tick(value), { "text-anchor": "middle", class: "quiet small" }));
  const drawn = series.map(({ ys, look }, number) => {
    const points = ys.map((value, index) => [across(index), value]).filter(([, value]) => drawable(value))
      .map(([left, value]) => [round(left), round(up(value))]);
    const line = points.map(([left, top], index) => `${index ? "L" : "M"}${left} ${top}`).join("");
    const stride = Math.max(1, Math.ceil(points.length / most));
    return el("g", { class: `series s${look ?? number}` }, line && el("path", { d: line, class: "line" }),
      points.filter((_, index) => index % stride === 0 || index === points.length - 1)
        .map(([left, top]) => MARKS[look ?? number](left, top)));
  });
  const named = places(series.map(({ name }) => short(name)));
  const names = named.map(({ name, left, top }, number) => {
    const look = series[number].look ?? number;
    return el("g", { class: `series s${look}` }, el("path", { d: `M${left} ${top}h22`, class: "line" }), MARKS[look](left + 11, top),
      text(left + 28, top + 5, name, { class: "name" }));
  });
  const further = named.at(-1).top - named[0].top; // what further lines of names take
  const bound = limit === undefined ? null : [
    el("line", { class: "rim", x1: axis, x2: RIGHT, y1: up(limit), y2: up(limit) }),
    text(RIGHT, up(limit) - 5, limitName, { "text-anchor": "end", class: "quiet small" })];
  const picture = [grid, upright, bound, drawn.reverse(), ticks, text((LEFT + RIGHT) / 2, BOTTOM + 40, x, { "text-anchor": "middle", class: "quiet" })];
  const svg = figure(height + further, label, names, further ? el("g", { transform: `translate(0 ${further})` }, picture) : picture);
  const rows = xs.map((value, index) => [value, ...series.map(({ ys }) => (ys[index] === undefined || ys[index] === null ? "–" : format(ys[index])))])
    .filter(([, ...cells]) => cells.some((cell) => cell !== "–"));
  // What a reader finds under the pointer or by the arrow keys: for each position its place, its points and its words.
  const seen = xs.map((_, index) => index).filter((index) => series.some(({ ys }) => drawable(ys[index])));
  const read = { label, lefts: seen.map(across), at(number) {
    const index = seen[number], known = series.filter(({ ys }) => drawable(ys[index]));
    return { left: across(index), top: TOP + further, bottom: BOTTOM + further, points: known.map(({ ys }) => up(ys[index]) + further),
      words: `${x}: ${tick(xs[index])}. ${known.map(({ name, ys }) => `${name}: ${format(ys[index])}`).join(", ")}.` };
  } };
  return { svg, say: label, read, table: table([x, ...series.map(({ name }) => `${name}: ${y}`)], rows, label) };
}

const short = (name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);

// Where each name stands, as many in a line as there is room for.
function places(names) {
  let left = LEFT + 4, top = 17;
  return names.map((name) => {
    const wide = 46 + name.length * 7.8;
    if (left + wide > RIGHT + 16 && left > LEFT + 4) [left, top] = [LEFT + 4, top + 19];
    const place = { name, left, top };
    left += wide;
    return place;
  });
}

// Which positions are named: all of a few, of many the round ones, which may lie between two points.
function below(xs) {
  if (xs.length <= 8) return xs.map((value, index) => [index, value]);
  return multiples(xs[0], xs.at(-1), 7).map((value) => {
    const after = Math.max(1, xs.findIndex((each) => each >= value));
    return [after - (xs[after] - value) / (xs[after] - xs[after - 1]), value];
  });
}

const logarithmic = (values) =>
  values.length ? extent(values).map((value, end) => (end ? Math.ceil : Math.floor)(Math.log10(value))) : [0, 1];

// From zero where sizes are compared; else as far as the values go, and a little beyond.
function linear(values, zero) {
  const [low, high] = extent(zero ? [...values, 0, 1e-20] : values);
  if (!Number.isFinite(low)) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [zero && low === 0 ? 0 : low - room, high + room];
}

const decades = (low, high) => {
  const every = Math.max(1, Math.ceil((high - low) / 5));
  return Array.from({ length: Math.floor((high - low) / every) + 1 }, (_, index) => 10 ** (low + index * every));
};

// The next round number.
function rounded(rough) {
  const size = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * size).find((each) => each >= rough);
}

// The multiples of a round number between two others, about `many` of them. Counted beforehand: far from zero, a number
// plus a small step is the same number, and a loop over them would not end.
function multiples(low, high, many) {
  const step = rounded((high - low) / many), first = Math.ceil(low / step);
  const number = Math.min(2 * many, Math.max(0, Math.floor(high / step) - first + 1));
  return Array.from({ length: number }, (_, index) => (first + index) * step);
}

const exponent = (value) => `10${String(Math.round(Math.log10(value))).replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])}`;

// With as many digits as tell it from its neighbours.
const tick = (value, step = 1) => {
  const size = Math.abs(value);
  if (size >= 1e9) return power(value);
  const [unit, sign] = size >= 1e6 ? [1e6, "M"] : size >= 1000 ? [1000, "k"] : [1, ""];
  return `${Number((value / unit).toFixed(Math.min(12, Math.max(2, Math.ceil(1 - Math.log10(step / unit))))))}${sign}`;
};

// Pictures as text: pure functions from values to SVG, so that Node can test them and a server can send them.

export const escaped = (text) =>
  String(text).replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);

export function el(name, attributes = {}, ...children) {
  const written = Object.entries(attributes)
    .filter(([, value]) => value !== undefined && value !== null && value !== false)
    .map(([key, value]) => ` ${key}="${escaped(typeof value === "number" ? round(value) : value)}"`)
    .join("");
  const inside = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  return inside.length ? `<${name}${written}>${inside.join("")}</${name}>` : `<${name}${written}/>`;
}

// The lowest and the highest of any number of values: as arguments of a function, 100,000 of them would be too many.
export function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

export const round = (value) => Math.round(value * 100) / 100;

export const text = (x, y, words, attributes = {}) => el("text", { x, y, ...attributes }, escaped(words));

// A figure: what it shows is said in words, for those who do not see it.
export function figure(height, label, ...children) {
  return el(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label },
    ...children,
  );
}

export const WIDTH = 420;

// One role, one colour, one pattern; the patterns are defined once in the page.
export const ROLES = ["parameters", "optimizer state", "gradients", "activations", "other"];

export const roleClass = (role) => role.replace(" ", "-");

export function bar(x, y, width, height, role) {
  if (height <= 0 || width <= 0) return "";
  const box = { x, y, width, height };
  const pattern = { "optimizer state": "dots", gradients: "hatch", activations: "stripes", overflow: "cross" }[role];
  return el(
    "g",
    { class: `role ${roleClass(role)}` },
    el("rect", { ...box, class: "fill" }),
    pattern && el("rect", { ...box, fill: `url(#${pattern})` }),
  );
}

export function table(head, rows, caption) {
  const row = (cells, tag) =>
    el("tr", {}, cells.map((cell, column) =>
      el(column || tag === "th" ? tag : "th", tag === "th" ? { scope: "col" } : column ? {} : { scope: "row" }, escaped(cell))));
  return el("table", {}, el("caption", {}, escaped(caption)), el("thead", {}, row(head, "th")),
    el("tbody", {}, rows.map((cells) => row(cells, "td"))));
}

export function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) [size, unit] = [size / 1024, unit + 1];
  return `${size >= 100 || unit === 0 ? size.toFixed(0) : size.toPrecision(3)} ${units[unit]}`;
}

// 1.2e-7 as people write it.
export function power(value) {
  if (Math.abs(value) < 1e-300) return "0"; // where powers of ten end
  const digits = Math.floor(Math.log10(Math.abs(value)));
  if (digits >= -2 && digits < 4) return String(Number(value.toPrecision(2)));
  const up = String(digits).replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);
  return `${(value / 10 ** digits).toFixed(1)} × 10${up}`;
}

export const percent = (share) => {
  const value = share * 100;
  return `${value >= 10 ? Math.round(value) : Number(value.toPrecision(2))} %`;
};

export const count = (number, one, many = `${one}s`) => `${grouped(number)} ${number === 1 ? one : many}`;

export const grouped = (number) => number.toLocaleString("en"); // 1,000,000

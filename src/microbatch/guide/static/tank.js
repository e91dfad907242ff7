// A tank of memory: what is in it by role, its rim, and what has run over.

import { bar, bytes, el, ROLES, text } from "./svg.js";

export const MIB = 1024 ** 2;

export const TANKS = { low: 16, high: 192, step: 4 }; // MiB that the reader can choose

export function parts(measured) {
  const known = ROLES.filter((role) => role !== "other").map((role) => [role, measured[role] ?? 0]);
  const other = measured.total - known.reduce((sum, [, size]) => sum + size, 0);
  return [...known, ["other", Math.max(0, other)]];
}

// What is no role of its own: the rows themselves, and what operators need for a moment.
export const named = (role) => (role === "other" ? "inputs, scratch" : role);

export const total = (list) => list.reduce((sum, [, size]) => sum + size, 0);

// A tank that is filled from below; what is above the rim has overflowed.
export function tank(x, y, width, height, list, { scale, capacity, label }) {
  const drawn = [];
  let level = y + height;
  for (const [role, size] of list) {
    const high = size * scale;
    level -= high;
    drawn.push(bar(x, level, width, high, role));
  }
  const sum = total(list);
  if (capacity !== undefined) {
    const rim = y + height - capacity * scale;
    if (sum > capacity) drawn.push(bar(x, level, width, rim - level, "overflow"));
    drawn.push(el("path", { class: "tank", d: `M${x - 5} ${rim}V${y + height}H${x + width + 5}V${rim}` }));
    drawn.push(el("line", { class: "rim", x1: x - 12, x2: x + width + 12, y1: rim, y2: rim }));
  } else drawn.push(el("path", { class: "tank", d: `M${x - 5} ${y}V${y + height}H${x + width + 5}V${y}` }));
  if (label) drawn.push(text(x + width / 2, y + height + 20, label, { "text-anchor": "middle" }));
  return drawn;
}

export function legend(x, y, list, { step = 30 } = {}) {
  return list.map(([role, size], line) => [
    bar(x, y + line * step, 16, 16, role),
    text(x + 22, y + line * step + 13, named(role), { class: `label ${role.replace(" ", "-")}` }),
    size === undefined ? null : text(420 - 4, y + line * step + 13, bytes(size), { "text-anchor": "end", class: "number" }),
  ]);
}

export const overflowSign = (x, y, words) =>
  el("g", { class: "overflow sign" },
    el("path", { d: `M${x} ${y + 4}l9 -16l9 16z`, class: "icon" }),
    text(x + 9, y + 2, "!", { "text-anchor": "middle", class: "mark" }),
    text(x + 24, y + 3, words));

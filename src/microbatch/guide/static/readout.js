// A chart that can be read off: under the pointer, under a finger, or by the arrow keys, which move a cursor over it.

import { el, WIDTH } from "./svg.js";

const readers = new WeakMap(); // what is known of each place where charts are drawn

// Show what was drawn: the picture, its words, its table. While much is told, a table is written only where it is open.
export function show(figure, { svg, say, table, read }, { late = false } = {}) {
  const [drawing, words, twin] = ["drawing", "say", "table"].map((name) => figure.querySelector(`[data-${name}]`));
  drawing.innerHTML = svg;
  words.textContent = say;
  readable(drawing, words, read);
  if (!twin) return;
  const fold = twin.closest("details");
  fold.hidden = !table;
  if (!late || fold.open) twin.innerHTML = table;
}

// `read` is the chart's, and undefined where the picture is none.
function readable(drawing, say, read) {
  const reader = readers.get(drawing) ?? start(drawing);
  Object.assign(reader, { say, read, said: say.textContent });
  if (!read?.lefts.length) return ["role", "tabindex", "aria-label", "aria-valuetext", "aria-valuemin", "aria-valuemax", "aria-valuenow"].forEach((name) => drawing.removeAttribute(name));
  const attributes = { role: "slider", tabindex: 0, "aria-label": `Read off: ${read.label}`, "aria-valuemin": 1, "aria-valuemax": read.lefts.length };
  for (const [name, value] of Object.entries(attributes)) drawing.setAttribute(name, value);
  reader.show();
}

function start(drawing) {
  const reader = { at: null, show };
  readers.set(drawing, reader);

  // Where the cursor is; at the last point it stays there, whatever comes.
  function show() {
    const { read, say, said, at } = reader, last = read.lefts.length - 1;
    const number = at === null || at > last ? last : at, { left, top, bottom, points, words } = read.at(number);
    drawing.setAttribute("aria-valuenow", number + 1);
    drawing.setAttribute("aria-valuetext", words);
    drawing.querySelector(".cursor")?.remove();
    // What stands below stays where it is: a finger may be on its way to it.
    say.style.minHeight = at === null ? "" : say.style.minHeight || `${say.offsetHeight}px`;
    say.textContent = at === null ? said : words;
    if (at !== null) drawing.firstElementChild.insertAdjacentHTML("beforeend", el("g", { class: "cursor" },
      el("path", { d: `M${left} ${top}V${bottom}` }), points.map((y) => el("circle", { cx: left, cy: y, r: 7 }))));
  }

  const move = (at) => {
    reader.at = at;
    if (reader.read?.lefts.length) show();
  };
  const near = ({ clientX }) => {
    if (!reader.read?.lefts.length) return;
    const { left, width } = drawing.firstElementChild.getBoundingClientRect(), x = ((clientX - left) / width) * WIDTH;
    const { lefts } = reader.read;
    move(lefts.reduce((best, each, index) => (Math.abs(each - x) < Math.abs(lefts[best] - x) ? index : best), 0));
  };
  drawing.addEventListener("pointermove", near);
  drawing.addEventListener("pointerdown", (event) => (near(event), drawing.focus({ preventScroll: true }))); // what a finger chose stays
  drawing.addEventListener("pointerleave", () => drawing.matches(":focus") || move(null));
  drawing.addEventListener("focus", () => reader.at ?? move(Infinity));
  drawing.addEventListener("blur", () => move(null));
  drawing.addEventListener("keydown", (event) => {
    if (!reader.read?.lefts.length) return;
    const last = reader.read.lefts.length - 1, here = Math.min(reader.at ?? last, last), leap = Math.max(1, Math.round(last / 10));
    const to = { ArrowLeft: here - 1, ArrowDown: here - 1, ArrowRight: here + 1, ArrowUp: here + 1, PageDown: here - leap, PageUp: here + leap, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    move(to >= last ? Infinity : Math.max(0, to));
  });
  return reader;
}

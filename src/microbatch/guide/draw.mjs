// Draw the page's figures as they stand before anyone touches them, with the functions that the browser uses.
// `python -m microbatch.guide.measure` runs this after measuring; `node draw.mjs --check` only compares.

import { readFileSync, writeFileSync } from "node:fs";
import { FIGURES, START } from "./static/figures.js";

const here = (name) => new URL(name, import.meta.url);
const measured = JSON.parse(readFileSync(here("static/measured.json"), "utf8"));
const drawn = Object.fromEntries(
  Object.entries(FIGURES).map(([name, draw]) => {
    const { svg, say, table } = draw(START[name], measured);
    return [name, { svg, say, table }];
  }),
);
const text = `${JSON.stringify(drawn, null, 1)}\n`;
if (!process.argv.includes("--check")) writeFileSync(here("drawn.json"), text);
else if (readFileSync(here("drawn.json"), "utf8") !== text) {
  console.error("drawn.json is not what the figures draw; run python -m microbatch.guide.measure --draw");
  process.exit(1);
}

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { written } from "../../../src/microbatch/guide/static/nodes.js";
import { CUTS, fits, LAST, LIMIT, momentOf, need, plan, stateAt, words } from "../../../src/microbatch/guide/static/stage.js";
import { SHAPES, stagePicture } from "../../../src/microbatch/guide/static/stage-picture.js";
import { bytes } from "../../../src/microbatch/guide/static/svg.js";

const measured = JSON.parse(readFileSync(new URL("../../../src/microbatch/guide/static/measured.json", import.meta.url), "utf8"));
const moments = Array.from({ length: LAST / 4 + 1 }, (_, index) => index * 4);
const everywhere = (check) => { for (const cut of CUTS) for (const t of moments) check(cut, t, stateAt(cut, t, measured)); };

test("the same cut and moment give the same picture, in both shapes", () => {
  for (const shape of Object.values(SHAPES))
    for (const cut of CUTS) for (const t of moments) {
      const svg = written(stagePicture(cut, t, measured, shape));
      assert.equal(svg, written(stagePicture(cut, t, structuredClone(measured), shape)));
      assert.ok(!/NaN|undefined|null|Infinity|="-?\d+\.\d{3}/.test(svg), svg.match(/.{40}(NaN|undefined|null|Infinity)/)?.[0]);
    }
});

test("from moment to moment the picture keeps its nodes", () => {
  const form = (tree) => (typeof tree === "string" ? "t" : `${tree.name}(${tree.children.map(form).join()})`);
  for (const shape of Object.values(SHAPES))
    for (const cut of CUTS)
      assert.equal(new Set(moments.map((t) => form(stagePicture(cut, t, measured, shape)).replace(/text\(t?\)/g, "text()"))).size, 1);
});

test("while it plays something moves in every tenth of a second, and by steps that an eye can follow", () => {
  for (const cut of CUTS) {
    const { end } = plan(cut, measured), step = Math.round(LAST / (end * 10));
    let before = "";
    for (let t = 0; t <= LAST; t += step) {
      const svg = written(stagePicture(cut, t, measured, SHAPES.wide));
      assert.notEqual(svg, before);
      before = svg;
    }
    assert.ok(end < 16, end);
  }
});

test("memory ends exactly where more is needed than there is, and the words say the meter’s need", () => {
  for (const cut of CUTS) {
    const known = (cut === 1 ? measured.memory.alone : measured.memory.window)[64 / cut].total;
    const { moves } = plan(cut, measured);
    assert.equal(need(cut, measured), known);
    assert.equal(moves.some(({ phase }) => phase === "overflow"), known > LIMIT);
    const last = words(stateAt(cut, LAST, measured));
    assert.ok(last.includes(bytes(known)), last);
    const picture = written(stagePicture(cut, LAST, measured, SHAPES.wide));
    assert.equal(picture.includes(`needs ${bytes(known)}, has 96 MiB`), known > LIMIT);
  }
  assert.deepEqual(CUTS.map((cut) => fits(cut, measured)), [false, true, true, true]);
});

test("the memory is never more than the step’s peak, nor than the limit, and reaches the one or the other", () => {
  for (const cut of CUTS) {
    const levels = moments.map((t) => stateAt(cut, t, measured).total), most = Math.max(...levels);
    const bound = Math.min(LIMIT, need(cut, measured));
    assert.ok(most <= bound * 1.001 && most > bound * 0.96, `${cut}: ${bytes(most)} of ${bytes(bound)}`);
  }
});

test("the bars grow to the whole batch’s gradient by nothing but the microbatches’ shares", () => {
  for (const cut of CUTS.slice(1)) {
    const { sums } = stateAt(cut, LAST, measured);
    sums.forEach((sum, entry) => assert.ok(Math.abs(sum - measured.shares.whole[entry]) < 2e-3 * Math.abs(sum), `${sum}`));
    const after = plan(cut, measured).moves.filter(({ phase }) => phase === "add").map(({ to }) => stateAt(cut, Math.ceil((to / plan(cut, measured).end) * LAST), measured));
    after.forEach(({ sums: so, done }, number) => {
      assert.equal(done, number + 1);
      so.forEach((sum, entry) => assert.ok(Math.abs(sum - measured.shares.cuts[cut].shares.slice(0, number + 1).reduce((all, each) => all + each[entry], 0)) < 1e-9));
    });
  }
  assert.deepEqual(stateAt(1, LAST, measured).sums, Array(7).fill(0)); // what did not fit has no gradient
});

test("the weights stand still until every share is there, and move once", () =>
  everywhere((cut, t, state) => assert.ok(state.stepped === 0 || (state.done === cut && state.agreed))));

test("every move can be gone to, and is then the one that is shown", () => {
  for (const cut of CUTS)
    plan(cut, measured).moves.forEach((move, number) => assert.equal(stateAt(cut, momentOf(cut, number, measured), measured).at, number));
});

test("a sentence of the stage is short", () => everywhere((cut, t, state) => assert.ok(words(state).split(" ").length <= 24, words(state))));

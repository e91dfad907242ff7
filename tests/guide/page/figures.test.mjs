import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { decision, drawnTo, FIGURES, loop, START, weights } from "../../../src/microbatch/guide/static/figures.js";
import { plot } from "../../../src/microbatch/guide/static/plot.js";
import { bytes, power, percent } from "../../../src/microbatch/guide/static/svg.js";
import { parts, TANKS } from "../../../src/microbatch/guide/static/tank.js";

const room = new URL("../../../src/microbatch/guide/", import.meta.url);
const measured = JSON.parse(readFileSync(new URL("static/measured.json", room), "utf8"));
const drawn = JSON.parse(readFileSync(new URL("drawn.json", room), "utf8"));

for (const [name, draw] of Object.entries(FIGURES)) {
  test(`${name}: the same choice gives the same picture, the one that the page shows without JavaScript`, () => {
    const { svg, say, table } = draw(START[name], measured);
    assert.equal(draw(structuredClone(START[name]), structuredClone(measured)).svg, svg);
    assert.deepEqual(drawn[name], { svg, say, table });
    assert.ok(!/NaN|undefined|null|Infinity/.test(svg + say + table), svg.match(/.{30}(NaN|undefined|null|Infinity)/)?.[0]);
    assert.match(svg, /role="img" aria-label="[^"]+"/);
    assert.match(table, /<caption>/);
  });
}

test("the gradient grows with every backward, and nothing else makes it grow", () => {
  const heights = Array.from({ length: 14 }, (_, index) => Number(/gradient (\d+)\/4/.exec(loop(index, { microbatches: 4 }).svg)[1]));
  assert.deepEqual(heights, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]);
});

test("an index outside of the loop is its nearest end", () => {
  assert.equal(loop(-5, { microbatches: 4 }).svg, loop(0, { microbatches: 4 }).svg);
  assert.equal(loop(99, { microbatches: 4 }).svg, loop(13, { microbatches: 4 }).svg);
});

test("at every stop of its sliders the tank’s picture, words and table are of one measurement", () => {
  for (const [batch, known] of Object.entries(measured.memory.window))
    for (let tank = TANKS.low; tank <= TANKS.high; tank += TANKS.step) {
      const { svg, say, table } = FIGURES.tank({ batch: Number(batch), tank }, measured);
      const over = known.total > tank * 2 ** 20;
      assert.equal(svg.includes("Out of memory</text>"), over);
      assert.equal(say.startsWith("Out of memory"), over);
      assert.ok(say.includes(` ${bytes(known.total)}`), say);
      assert.ok(table.includes(`<th scope="row">together</th><td>${bytes(known.total)}</td>`));
      for (const role of ["parameters", "optimizer state", "gradients", "activations"]) {
        assert.match(svg, new RegExp(`>${role}</text><text[^>]*>${bytes(known[role])}<`));
        assert.ok(table.includes(`<th scope="row">${role}</th><td>${bytes(known[role])}</td>`));
      }
    }
});

test("the tank says both sizes of a batch at once: beside a gradient, and the one that the stage and the memory show", () => {
  for (const batch of [1, 32, 64])
    assert.match(FIGURES.tank({ batch, tank: 96 }, measured).say, new RegExp(`${bytes(measured.memory.window[batch].total)}.* Before there is a gradient: ${bytes(measured.memory.alone[batch].total)}\\.`));
});

test("a level that is drawn goes to the next size after a quarter of the way, and stays where it is not moved", () => {
  const sizes = [1, 2, 4, 8, 16, 32, 64], total = (size) => measured.memory.window[size].total;
  const between = (low, share) => total(low) + (total(2 * low) - total(low)) * share;
  sizes.forEach((size, index) => assert.equal(drawnTo(index, total(size), sizes, measured), index));
  assert.equal(drawnTo(5, between(32, 0.3), sizes, measured), 6);
  assert.equal(drawnTo(5, between(32, 0.2), sizes, measured), 5);
  assert.equal(drawnTo(6, between(32, 0.7), sizes, measured), 5);
  assert.equal(drawnTo(6, between(32, 0.8), sizes, measured), 6);
  assert.deepEqual([drawnTo(3, 1e12, sizes, measured), drawnTo(3, 0, sizes, measured)], [6, 0]);
});

test("the parts of a tank are all that was measured", () => {
  for (const each of Object.values(measured.memory.window))
    assert.equal(parts(each).reduce((sum, [, size]) => sum + size, 0), each.total);
});

test("one denominator weighs every token alike; others do so only where microbatches are alike", () => {
  const lengths = [8, 1, 2, 5];
  assert.deepEqual(weights(lengths, "right"), lengths.map(() => 1 / 16));
  weights(lengths, "weighted").forEach((weight) => assert.ok(Math.abs(weight - 1 / 16) < 1e-15));
  assert.deepEqual(weights(lengths, "means"), [1 / 32, 1 / 4, 1 / 8, 1 / 20]);
  assert.deepEqual(weights(lengths, "none"), [1 / 8, 1, 1 / 2, 1 / 5]);
  assert.deepEqual(weights([4, 4], "means"), weights([4, 4], "right"));
});

test("the stack is the whole batch’s under one denominator, four times it without, and wrong by mean of means only on unequal lengths", () => {
  const ratio = (rule, lengths) => FIGURES.mathematics({ rule, lengths }, measured).ratio;
  for (const lengths of [[4, 4, 4, 4], [1, 16, 3, 2], [16, 1, 1, 16]]) assert.ok(Math.abs(ratio("right", lengths) - 1) < 1e-12);
  assert.ok(Math.abs(ratio("none", [4, 4, 4, 4]) - 4) < 1e-9);
  assert.ok(Math.abs(ratio("means", [4, 4, 4, 4]) - 1) < 1e-12);
  assert.ok(Math.abs(ratio("means", [16, 1, 1, 16]) - 1) > 0.02);
  for (const rule of ["right", "none", "means"]) {
    const { say, svg, ratio: found } = FIGURES.mathematics({ rule, lengths: [16, 1, 1, 16] }, measured);
    assert.ok(svg.includes(`× ${found.toFixed(2)}<`));
    assert.equal(svg.includes(`not divided: × ${FIGURES.mathematics({ rule: "none", lengths: [16, 1, 1, 16] }, measured).ratio.toFixed(2)}<`), rule !== "none");
    if (rule === "none") assert.ok(say.includes(`${found.toFixed(2)} times`));
    if (rule === "means") assert.ok(say.includes(`${percent(Math.abs(found - 1))} off`));
  }
});

test("every path of answers ends in one advice", () => {
  assert.equal(decision({ path: [false] }).end, "Accumulate: this is what it is for.");
  assert.equal(decision({ path: [true, true] }).end, "Accumulate: one exchange a step.");
  assert.equal(decision({ path: [true, false, true] }).end, "Accumulate to a larger batch.");
  assert.equal(decision({ path: [true, false, false] }).end, "Do not: it would only take time.");
  assert.equal(decision({ path: [true] }).end, undefined);
});

test("a chart stands values that are missing, equal or not finite", () => {
  for (const ys of [[1], [0, 0, 0], [null, 2], [NaN, 1e-9, Infinity], []])
    for (const log of [true, false])
      assert.ok(!/NaN|Infinity/.test(plot({ label: "l", xs: ys.map((_, index) => index), x: "x", y: "y", log, series: [{ name: "s", ys }] }).svg));
});

test("of few positions all are named, of many the round ones, where they are", () => {
  const named = (xs) => [...plot({ label: "l", xs, x: "x", y: "y", series: [{ name: "s", ys: xs }] }).svg.matchAll(/<text x="([\d.]+)" y="232"[^>]*>(\d+)</g)].map(([, at, value]) => [Number(at), Number(value)]);
  assert.deepEqual(named([1, 2, 4, 8]).map(([, value]) => value), [1, 2, 4, 8]);
  const many = named(Array.from({ length: 60 }, (_, index) => 1 + index * 7));
  assert.deepEqual(many.map(([, value]) => value), [100, 200, 300, 400]);
  const between = many.slice(1).map(([at], index) => at - many[index][0]);
  assert.ok(Math.max(...between) - Math.min(...between) < 0.1, between);
});

test("no two heights of an axis bear the same number", () => {
  const axis = (ys) => [...plot({ label: "l", xs: ys.map((_, index) => index), x: "x", y: "y", zero: false, series: [{ name: "s", ys }] }).svg.matchAll(/text-anchor="end" class="quiet small">([^<]*)</g)].map(([, words]) => words);
  for (const ys of [[2.297, 2.309], [0.03121, 0.03124], [14_190, 14_203], [1e6, 1e6 + 40], [-3, 5], [0.25, 0.5]]) {
    const found = axis(ys);
    assert.ok(found.length > 1 && new Set(found).size === found.length, found);
  }
  assert.deepEqual(axis([2.297, 2.309]), ["2.3", "2.305"]);
});

test("numbers are written as people write them", () => {
  assert.equal(power(1.26e-7), "1.3 × 10⁻⁷");
  assert.equal(power(0), "0");
  assert.equal(percent(0.204), "20 %");
});

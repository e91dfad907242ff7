import assert from "node:assert/strict";
import { test } from "node:test";
import * as panes from "../../../src/microbatch/guide/static/live-panes.js";

const line = (step, more = {}) => ({ id: step, step, loss: 1 / step, lr: 0.1, grad_norm: 2, per_second: 10, microbatch_size: 8, retries: 0, applied: true, ...more });
const timeline = { wait: 0.1, forward: [0.2, 0.2], backward: [0.3, 0.3], finish: 0.05, optimizer: 0.05 };
const run = (lines, more = {}) => ({ name: "r", settings: { steps: 3, memory: 1000 }, summary: null, lines, ...more });

test("every picture stands a run that has said nothing, little, or what JSON cannot hold", () => {
  const lines = [line(1), line(2, { loss: null, grad_norm: null }), line(3, { timeline, memory: { activations: 600, parameters: 300 }, validation: { loss: 0.5 }, noise_scale: 40 })];
  for (const runs of [[], [run([])], [run(lines)], [run(lines), run([line(1), { id: 2, step: 2 }])]])
    for (const drawn of [panes.lossOf, panes.validationOf, panes.rateOf, panes.speedOf, panes.normOf, panes.noiseOf].map((pane) => pane(runs)).concat(panes.memoryOf(runs[0]), panes.timelineOf(runs[0])))
      assert.ok(!/NaN|undefined|Infinity/.test(drawn.svg + drawn.say + drawn.table), drawn.svg);
});

test("the times of a step add up, and each part has its share", () => {
  const { table, say } = panes.timelineOf(run([line(1, { timeline })]));
  assert.match(say, /2 microbatches in 1\.20 s/);
  assert.deepEqual([...table.matchAll(/(\d+) %/g)].map(([, share]) => Number(share)), [8, 33, 50, 4, 4]);
});

test("a step that was chosen is shown, or the last one before it that was timed", () => {
  const lines = [line(1, { timeline }), line(2), line(3, { timeline })];
  assert.match(panes.timelineOf(run(lines), 2).say, /^Step 1:/);
  assert.match(panes.timelineOf(run(lines)).say, /^Step 3:/);
});

test("the memory is held against the limit", () => {
  const over = panes.memoryOf(run([line(1, { memory: { activations: 900, parameters: 300 } })]));
  assert.match(over.svg, /overflow/);
  assert.match(over.say, /of 1000 B allowed/);
});

test("retries, dropped windows and other cuts are told; a steady run tells nothing", () => {
  const lines = [line(1), line(2, { retries: 2, microbatch_size: 4 }), line(3, { microbatch_size: 4, applied: false })];
  assert.equal(panes.happened(run(lines)).length, 3);
  assert.deepEqual(panes.happened(run([line(1), line(2)])), []);
});

test("a run stands as its files say", () => {
  assert.match(panes.standing(run([line(3)], { summary: { finished: true, step: 3 } })), /^finished: step 3 of 3/);
  assert.match(panes.standing(run([line(2)], { summary: { finished: false, step: 2, stopped_by: "SIGINT" } })), /^stopped by SIGINT/);
  assert.match(panes.standing(run([line(4)], { summary: { finished: false, step: 2, stopped_by: "SIGINT" } })), /^running/);
  assert.match(panes.standing(run([line(2, { retries: 1 })])), /^running: step 2 of 3, loss 0.5, 1 retry, 0 skipped windows$/);
  assert.match(panes.standing(run([line(2)], { silent: 1e9 })), /^no news since .*2001/);
});

test("a long run is thinned out, evenly, and keeps its last step in sight", () => {
  const lines = Array.from({ length: 5000 }, (_, index) => line(index + 1));
  const { table } = panes.lossOf([run(lines)]);
  assert.ok(table.split("<tr>").length < 450);
});

test("of a long run, what is measured now and then is not lost between the points", () => {
  const lines = Array.from({ length: 900 }, (_, index) => line(index + 1, (index + 1) % 20 === 11 ? { noise_scale: 7 } : {}));
  const { table, say } = panes.noiseOf([run(lines)]);
  assert.equal(table.match(/<td>7<\/td>/g).length, 45);
  assert.match(say, /now 7/);
});

test("a run looks the same in every chart, and like no other", () => {
  const runs = Array.from({ length: 6 }, (_, index) => run([line(1, index ? { validation: { loss: 1 } } : {}), line(2)], { name: `run ${index}` }));
  const looks = (svg) => [...svg.matchAll(/class="series (s\d)">(?:(?!<\/g>).)*class="name">([^<]*)</g)].map(([, look, name]) => [name, look]);
  const known = looks(panes.lossOf(runs).svg);
  assert.equal(new Set(known.map(([, look]) => look)).size, 6);
  assert.deepEqual(looks(panes.validationOf(runs).svg), known.slice(1));
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { apply, badge, begin, ended, status } from "../../../src/microbatch/guide/static/runs.js";
import { loopPane, lossPane, errorPane, tankPane } from "../../../src/microbatch/guide/static/panes.js";
import { filled, nameOf, presetOf, readAddress, readMoment, writeAddress } from "../../../src/microbatch/guide/static/state.js";

const fields = {
  model: { label: "Model", default: "mlp", choices: ["mlp", "conv"], word: null },
  batch: { label: "Batch", default: 32, choices: null, low: 1, high: 256, whole: true, word: null },
  microbatch: { label: "Microbatch", default: 8, choices: null, low: 1, high: 256, whole: true, word: "auto" },
  lr: { label: "Rate", default: 0.05, choices: null, low: 1e-6, high: 10, whole: false, word: null },
};

test("an address is read as it was written", () => {
  const values = { model: "conv", batch: 64, microbatch: "auto", lr: 0.3 };
  assert.deepEqual(readAddress(fields, writeAddress(fields, values)), { values, notices: [] });
  assert.equal(writeAddress(fields, { model: "mlp", batch: 32, microbatch: 8, lr: 0.05 }), "");
});

test("what an address cannot mean falls back, and says so", () => {
  const { values, notices } = readAddress(fields, "?batch=many&model=../x&lr=1e99&nonsense=1&microbatch=2.5&loop=3", { others: ["loop"] });
  assert.deepEqual(values, { model: "mlp", batch: 32, microbatch: 8, lr: 0.05 });
  assert.equal(notices.length, 5);
  assert.ok(notices.every((words) => words.length < 200));
});

test("an address may name a preset, and change it", () => {
  const presets = { wide: { settings: { model: "conv", batch: 64 } } };
  const { values, notices } = readAddress(fields, "?lr=0.3&preset=wide", { presets });
  assert.deepEqual([values, notices], [{ model: "conv", batch: 64, microbatch: 8, lr: 0.3 }, []]);
  assert.equal(presetOf(fields, presets, values), undefined);
  assert.equal(presetOf(fields, presets, { ...filled(fields), model: "conv", batch: "64" }), "wide");
  for (const unknown of ["none", "toString"]) assert.match(readAddress(fields, `?preset=${unknown}`, { presets }).notices[0], /preset that does not exist/);
});

test("a moment is taken where there is such a moment", () => {
  const known = { cuts: [1, 2, 4, 8], last: 1000 };
  assert.deepEqual(readMoment("?loop=4-350", "loop", known), { cut: 4, t: 350 });
  assert.deepEqual(readMoment("", "loop", known), {});
  for (const wrong of ["3-350", "4-1001", "4", "-1", "x", "4-1.5", ""]) assert.match(readMoment(`?loop=${wrong}`, "loop", known).notice, /none such/);
});

test("a result is named by its preset, its cut, its rate, and whatever is not as usual", () => {
  const presets = { wide: { title: "Wide", settings: { model: "conv", batch: 64 } } };
  assert.equal(nameOf(fields, presets, filled(fields, presets.wide.settings)), "Wide: 64 = 8 × 8 rows, learning rate 0.05, model: conv");
  assert.equal(nameOf(fields, presets, filled(fields, { batch: 50, lr: 1 })), "50 rows in microbatches of 8, learning rate 1");
  const said = (name, value) => `${name} as ${value} is called`;
  assert.equal(nameOf(fields, presets, filled(fields, { model: "conv" }), said), "32 = 4 × 8 rows, learning rate 0.05, model: model as conv is called");
});

const settings = { batch: 32, microbatch: 8, steps: 2 };
const step = (id, index, more = {}) => ({ id, kind: "step", step: index, loss: 2, full_loss: 2, error: 1e-7, own_error: 1e-7, tolerance: 2e-7, scale: 1,
  microbatches: 4, peak_bytes: 4000, per_second: 100, memory: { parameters: 1000, activations: 2000 }, whole: null, ...more });
const run = [
  { id: 1, kind: "ready", parameters: 100, budget: 5000 },
  ...[0, 1, 2, 3].flatMap((index) => [
    { id: 2 + 2 * index, kind: "forward", index },
    { id: 3 + 2 * index, kind: "microbatch", step: 0, index, microbatches: 4, rows: 8 },
  ]),
  step(10, 0),
];

test("speed is of rows, whatever a run's loss counts", () => {
  assert.match(status(run.reduce(apply, begin(settings))), /^Running: step 1 of 2, loss 2\.000, 100 rows a second\.$/);
});

test("events that are told again change nothing", () => {
  const once = run.reduce(apply, begin(settings));
  const again = [...run, ...run, run[4]].reduce(apply, begin(settings));
  assert.deepEqual(again, once);
  assert.deepEqual(once.done, { microbatch: 4, step: 1 });
});

test("the pictures are those of the events, and of nothing else", () => {
  const view = run.reduce(apply, begin(settings));
  for (const pane of [loopPane, tankPane, lossPane, errorPane]) {
    assert.equal(pane(view).svg, pane(structuredClone(view)).svg);
    assert.ok(!/NaN|undefined/.test(pane(view).svg), pane(view).svg);
    assert.ok(!/NaN|undefined/.test(pane(begin(settings)).svg));
  }
  assert.match(loopPane(view).svg, /4 forwards · 4 backwards · 1 step</);
  assert.match(loopPane(run.slice(0, 4).reduce(apply, begin(settings))).svg, /gradient 1\/4/);
});

test("all may go forward before any goes backward, and the picture says so", () => {
  const forwards = [3, 2, 1, 0].map((index, number) => ({ id: 2 + number, kind: "forward", index }));
  const view = [run[0], ...forwards].reduce(apply, begin(settings));
  assert.match(loopPane(view).svg, /4 forwards · 0 backwards · 0 steps</);
  assert.match(loopPane(view).svg, /gradient 0\/4/);
  assert.match(loopPane(apply(view, { ...run[2], id: 6 })).svg, /gradient 1\/4/);
  assert.match(loopPane(apply(apply(view, step(6, 0)), { id: 7, kind: "forward", index: 0 })).svg, /1 forward · 0 backwards · 0 steps</);
});

test("the badge is the log's number against its own tolerance", () => {
  const view = run.reduce(apply, begin(settings));
  assert.deepEqual(badge(view), { right: true, error: 1e-7, tolerance: 2e-7, scale: 1 });
  assert.equal(badge(apply(view, step(11, 1, { error: 3 }))).right, false);
  assert.equal(badge(begin(settings)), null);
});

test("a run ends once, however it ends, and says how", () => {
  for (const kind of ["done", "stopped", "failed", "overflow"]) {
    const view = apply(run.reduce(apply, begin(settings)), { id: 11, kind, error: "because", memory: {}, peak_bytes: 9000 });
    assert.ok(ended(view));
    assert.match(status(view), /\w/);
  }
  assert.ok(!ended(begin(settings)));
});

test("a retry shows what overflowed until a step has gone well", () => {
  const retry = { id: 2, kind: "retry", step: 0, index: 0, before: 32, after: 16, error: "e", peak_bytes: 9000, memory: { activations: 8000 }, rows: 32, need_bytes: 20480, need_memory: { activations: 18000 } };
  const view = [run[0], retry].reduce(apply, begin({ ...settings, microbatch: 32 }));
  assert.equal(view.planned, 2);
  assert.match(tankPane(view).svg, /overflow/);
  assert.match(tankPane({ ...view, ready: { budget: 8000 } }).say, /^Microbatches of 32 rows need 20.0 KiB; the budget is 7.81 KiB/);
  assert.match(loopPane(view).say, /everything is put back/);
  const after = tankPane(apply(view, step(3, 0)));
  assert.doesNotMatch(after.svg, /overflow by|sign/);
  assert.match(after.say, /It overflowed in microbatches of 32, and goes on in microbatches of 16\./);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import * as panes from "../../../src/microbatch/guide/static/live-panes.js";
import { plot } from "../../../src/microbatch/guide/static/plot.js";

const line = (step, more = {}) => ({ id: step, step, loss: 1 / step, lr: 0.1, grad_norm: 2, per_second: 10, microbatch_size: 8, retries: 0, applied: true, ...more });
const timeline = { wait: 0.1, forward: [0.2, 0.2], backward: [0.3, 0.3], finish: 0.05, optimizer: 0.05 };
const run = (lines, more = {}) => ({ name: "r", settings: { steps: 3, memory: 1000 }, summary: null, totals: { percent: 100, retries: 0, skipped: 0, unreadable: 0, odd: 0, peak_bytes: 0 }, lines, ...more });

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
  const lines = [line(1), line(2, { retries: 2, microbatch_size: 4, before: 8 }), line(3, { microbatch_size: 4, applied: false })];
  assert.equal(panes.happened(run(lines)).length, 3);
  assert.deepEqual(panes.happened(run([line(1), line(2)])), []);
  assert.deepEqual(panes.happened(run([line(1), line(2, { loss: null })])), ["Step 2: the loss is no finite number."]);
});

test("a run stands as its files say", () => {
  assert.match(panes.standing(run([line(3)], { summary: { finished: true, step: 3 } })), /^finished: step 3 of 3/);
  assert.match(panes.standing(run([line(2)], { summary: { finished: false, step: 2, stopped_by: "SIGINT" } })), /^stopped by SIGINT/);
  assert.match(panes.standing(run([line(4)], { summary: { finished: false, step: 2, stopped_by: "SIGINT" } })), /^running/);
  const totals = { percent: 100, retries: 1, skipped: 0, unreadable: 2, first_unreadable: 7, odd: 1 };
  assert.match(panes.standing(run([line(2)], { totals })), /^running: step 2 of 3, loss 0.5, 1 retry, 0 skipped windows; 2 lines of metrics.jsonl cannot be read \(the first: line 7\); 1 value has a wrong type and is left out$/);
  assert.match(panes.standing(run([line(2, { loss: null })])), /loss not finite/);
  assert.equal(panes.standing(run([], { totals: { percent: 37 } })), "reading every step: 37 %");
  assert.match(panes.standing(run([line(2)], { totals: { percent: 37 } })), /^running: step 2 of 3, loss 0.5; reading every step: 37 %$/);
  assert.match(panes.standing(run([line(2)], { silent: 1e9 })), /^no news since .*2001/);
});

const told = (of) => Object.fromEntries(panes.headline(of).map(({ name, value, of, share }) => [name, [value, of || "", share || 0]]));

test("one row says how far a run is, how long it takes, how well it does, how full and how fast it is", () => {
  const lines = [line(1, { timeline }), line(2, { timeline, per_second: 30, validation: { loss: 0.25 }, peak_bytes: 750 })];
  assert.deepEqual(told(run(lines, { settings: { steps: 12, memory: 1000 } })), {
    Step: ["2", "of 12", 1 / 6], "Time left": ["12 s", "", 0], Loss: ["0.5", "validation 0.25", 0],
    "Memory, peak": ["750 B", "of 1000 B", 0.75], Speed: ["30", "items a second", 0],
  });
  assert.equal(told(run(lines, { summary: { finished: true, step: 2 } }))["Time left"][0], "finished");
  assert.equal(told(run(lines, { silent: 1e9 }))["Time left"][0], "–");
  assert.deepEqual(told(run([line(5)], { settings: { memory: "none" } })).Step, ["5", "", 0]);
  assert.deepEqual(panes.headline(run([])), []);
  assert.deepEqual([0, 45, 720, 12_000, 1e6].map(panes.duration), ["0 s", "45 s", "12 min", "3 h 20 min", "12 days"]);
  assert.ok(!/NaN|undefined|Infinity|<b>/.test(panes.headlineOf(run([line(1, { loss: null, per_second: undefined })], { settings: { steps: "<b>", memory: 0 } }))));
});

test("speed is of what the run counts; of several that count different things, no more is said", () => {
  const of = (unit) => run([line(1, { unit }), line(2)]);
  assert.equal(told(of("tokens")).Speed[1], "tokens a second");
  assert.match(panes.speedOf([of("tokens")]).say, /^Tokens a second by step; now 10\./);
  assert.match(panes.speedOf([of("tokens"), of("tokens")]).svg, /↑ tokens a second/);
  for (const runs of [[of("tokens"), of("images")], [of("tokens"), of(undefined)], [of(undefined)]]) assert.match(panes.speedOf(runs).say, /^Items a second/);
  assert.ok(!panes.speedOf([of("<b>")]).svg.includes("<b>"));
});

test("of one run the validation is in the chart of its loss; of several, each has a chart", () => {
  const lines = [line(1), line(2, { validation: { loss: 0.75 } }), line(3)];
  assert.match(panes.lossOf([run(lines)]).say, /now training: 0\.3333, validation: 0\.75/);
  assert.doesNotMatch(panes.lossOf([run(lines), run(lines)]).say, /validation/);
});

test("a chart is read off position by position: only where something is, at the height of its points", () => {
  const { read, svg } = plot({ label: "l", xs: [1, 2, 4], x: "rows", y: "y", series: [{ name: "one", ys: [5, null, 7] }, { name: "other", ys: [null, null, 9] }] });
  assert.equal(read.lefts.length, 2);
  assert.equal(read.at(0).words, "rows: 1. one: 5.");
  assert.equal(read.at(1).words, "rows: 4. one: 7, other: 9.");
  const circle = svg.match(/<circle cx="([\d.]+)" cy="([\d.]+)"/g).map((each) => each.match(/[\d.]+/g).map(Number));
  const { left, points } = read.at(1);
  assert.ok(circle.some(([x, y]) => Math.abs(x - left) < 0.01 && Math.abs(y - points[0]) < 0.01));
  assert.equal(panes.lossOf([run([])]).read, undefined);
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

test("a spike of one step in a million is drawn, and so is the dip beside it", () => {
  const lines = Array.from({ length: 2000 }, (_, index) => line(index * 500 + 1, { loss: 2 })).concat([line(999_998, { loss: 90 }), line(999_999, { loss: -7 }), line(1_000_000, { loss: 2 })]);
  const { table, say } = panes.lossOf([run(lines)]);
  assert.match(table, /<td>90<\/td>/);
  assert.match(table, /<td>-7<\/td>/);
  assert.match(say, /now 2\. Drawn are the lowest and the highest of every 5,000 steps\.$/);
  assert.match(panes.lossOf([run(lines, { totals: { percent: 3 } })]).say, /now 2\. Drawn is a sample; every step is being read\.$/);
});

test("a series of any length is drawn: no array becomes the arguments of a function", () => {
  const many = Array.from({ length: 300_000 }, (_, index) => index);
  const { svg } = plot({ label: "l", xs: many, x: "step", y: "y", series: [{ name: "r", ys: many }], evenly: true });
  assert.match(svg, /<path/);
  assert.match(plot({ label: "l", xs: many, x: "step", y: "y", log: true, series: [{ name: "r", ys: many }] }).svg, /<path/);
  assert.ok(panes.lossOf([run(many.map((index) => line(index + 1)))]).svg.length < 50_000);
  assert.ok(panes.timelineOf(run([line(1, { timeline: { wait: 0, forward: many, backward: many, finish: 0, optimizer: 0 } })])).svg.length < 200_000);
});

test("no file's numbers hang the page or break its pictures", { timeout: 20_000 }, () => {
  const pairs = [[2 ** 53 - 2, 2 ** 53 - 1], [1e17, 1e17 + 16], [-9e299, 9e299], [5e-324, 1e-300], [0, 0], [-1, -1], [1e-9, 1.0000000001e-9]];
  for (const [one, other] of pairs) {
    const lines = [one, other, one].map((value, index) => line(index + 1, { loss: value, lr: value, grad_norm: value, per_second: value, noise_scale: value, validation: { loss: value } }));
    for (const steps of [[1, 2, 3], [1, 2, 2 ** 53 - 1], [9, 2 ** 40, 3]])
      for (const pane of [panes.lossOf, panes.validationOf, panes.rateOf, panes.speedOf, panes.normOf, panes.noiseOf]) {
        const { svg, say } = pane([run(lines.map((each, index) => ({ ...each, step: steps[index] })))]);
        assert.ok(!/NaN|undefined|Infinity/.test(svg + say), `${pane.name} of ${one}, ${other}: ${svg}`);
      }
  }
  for (const memory of [{ activations: 0 }, { activations: 2 ** 53 - 1, "<b>": 1 }]) assert.ok(!/NaN|undefined|Infinity|<b>/.test(panes.memoryOf(run([line(1, { memory })])).svg));
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { events, indexOf, say, split, tally } from "../../../src/microbatch/guide/static/phases.js";

test("a batch is cut into ⌈B/m⌉ microbatches that hold all its rows, the last one short", () => {
  for (let batch = 1; batch <= 96; batch += 1)
    for (let microbatch = 1; microbatch <= batch; microbatch += 1) {
      const sizes = split(batch, microbatch);
      assert.equal(sizes.length, Math.ceil(batch / microbatch));
      assert.equal(sizes.reduce((sum, size) => sum + size, 0), batch);
      assert.ok(sizes.slice(0, -1).every((size) => size === microbatch));
      assert.equal(sizes.at(-1), batch % microbatch || microbatch);
    }
  assert.deepEqual(split(50, 8), [8, 8, 8, 8, 8, 8, 2]);
});

test("N forwards, N backwards, one step, at the end", () => {
  for (const microbatches of [1, 4, 7, 64]) {
    const list = events(microbatches);
    assert.equal(list.length, 3 * microbatches + 2);
    assert.deepEqual(tally(list, list.length - 1), { forwards: microbatches, backwards: microbatches, steps: 1 });
    assert.deepEqual(tally(list, list.length - 2), { forwards: microbatches, backwards: microbatches, steps: 0 });
    assert.equal(list.filter(({ phase }) => phase === "step").length, 1);
  }
});

test("a microbatch's index is where its event is", () => {
  const list = events(5);
  for (let microbatch = 0; microbatch < 5; microbatch += 1)
    for (const phase of ["take", "forward", "backward"])
      assert.deepEqual(list[indexOf(microbatch, phase)], { phase, microbatch });
});

test("every event is said in words", () => {
  for (const event of events(3)) assert.match(say(event, 3), /^[A-Z].*\.$/);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { ordered, span, sure, verdict } from "../../../src/microbatch/guide/static/paste.js";

const none = { certain: 0, depends: 0, speed: 0, not_judged: 0, unused_comments: 0 };
const found = (rules, counts = {}) => ({ findings: rules.map((rule) => ({ rule })), summary: { ...none, ...counts } });

test("a line is where it stands in the text", () => {
  const text = "one\n\nthree 🙂\nfour";
  const line = (number) => text.slice(...span(text, number));
  assert.deepEqual([1, 2, 3, 4].map(line), ["one", "", "three 🙂", "four"]);
  assert.deepEqual([line(0), line(5), line(1e9)], ["one", "four", "four"]);
  assert.deepEqual(span("", 1), [0, 0]);
});

test("what was found is one sentence", () => {
  assert.match(verdict(found([])), /^Nothing found\./);
  assert.match(verdict(found(["MB000"], { not_judged: 1 })), /cannot be read/);
  assert.match(verdict(found(["MB001"])), /no training loop/);
  assert.match(verdict(found(["MB001"]), "loss.backward()\noptimizer.step()"), /a step for every batch.*To accumulate, write it as above:/);
  assert.equal(verdict(found(["MB105", "MB110"], { certain: 1, depends: 1 })), "Found: 1 certain, 1 that depends.");
  assert.equal(verdict(found(["MB601", "MB002"], { speed: 2, not_judged: 1 })), "Found: 2 notes on speed, 1 not judged.");
});

test("notes on speed come last, the rest as it stands", () => {
  const given = [["MB601", "speed"], ["MB105", "error"], ["MB602", "speed"], ["MB101", "error"]].map(([rule, severity]) => ({ rule, severity }));
  assert.deepEqual(ordered(given).map(({ rule }) => rule), ["MB105", "MB101", "MB601", "MB602"]);
});

test("how sure it is names what decides", () => {
  assert.match(sure({ confidence: "certain", needs: [] }), /every setting/);
  assert.match(sure({ confidence: "depends", needs: ["the length", "the flag"] }), /depends on the length; the flag\./);
  assert.equal(sure({ confidence: "note", needs: [] }), "");
});

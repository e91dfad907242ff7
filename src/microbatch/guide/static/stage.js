// One optimizer step as a story: which moment it is, what is in memory, how far the gradient has grown. Pure functions of
// how often the batch is cut and of the moment, a whole number from 0 to LAST. Every size is a measured one.

import { bytes, count, power } from "./svg.js";
import { MIB } from "./tank.js";

export const CUTS = [1, 2, 4, 8];
export const LAST = 1000;
export const LIMIT = 96 * MIB; // of the device in the story
export const HAS = `${LIMIT / MIB} MiB`;
const KINDS = ["parameters", "optimizer state", "gradients", "activations", "other"];
const NUMBERS = 7;

// Seconds of each move of a microbatch, its rest included; the later microbatches go faster.
const SECONDS = { take: 0.6, forward: 1.3, backward: 1.3, add: 0.75 };
const RESTS = { take: 0.15, forward: 0.1, backward: 0.1, add: 0.3 };
const PACE = { 1: 1, 2: 0.75, 4: 0.5, 8: 0.28 };

const within = (value) => Math.max(0, Math.min(1, value));
const eased = (value) => (value < 0.5 ? 4 * value ** 3 : 1 - (2 - 2 * value) ** 3 / 2);
const sum = (parts) => KINDS.reduce((whole, kind) => whole + parts[kind], 0);

// -- the memory -------------------------------------------------------------------------------------------------------

// The moments that were measured of a microbatch's forward or backward; what does not change in a step was measured once.
const moments = (half, { memory }) => half.other.map((_, index) =>
  Object.fromEntries(KINDS.map((kind) => [kind, half[kind] ? half[kind][index] * 1024 : memory.window[1][kind]])));

// What is in memory while a microbatch goes forward or backward: as many moments as were measured, and the one before.
function curve(cut, index, phase, measured) {
  const turn = (number, half) => moments(measured.traces[cut][Math.min(number, 1)][half], measured);
  const rest = { ...turn(0, "forward")[0], activations: 0 };
  const before = phase === "backward" ? turn(index, "forward").at(-1) : index === 0 ? rest : turn(index - 1, "backward").at(-1);
  return [before, ...turn(index, phase)];
}

function between(points, share) {
  const at = share * (points.length - 1), low = Math.min(Math.floor(at), points.length - 2);
  return Object.fromEntries(KINDS.map((kind) => [kind, points[low][kind] + (points[low + 1][kind] - points[low][kind]) * (at - low)]));
}

// What a step needs at its peak.
export const need = (cut, { memory, reference }) => (cut === 1 ? memory.alone : memory.window)[reference.batch / cut].total;

export const fits = (cut, measured) => need(cut, measured) <= LIMIT;

// -- the moments ------------------------------------------------------------------------------------------------------

// The moves of a step, one after another: what happens, in which microbatch, from when to when, in seconds.
export function plan(cut, measured) {
  const moves = [];
  let now = 0;
  const move = (phase, index, seconds, rest = 0) => {
    moves.push({ phase, index, from: now, to: now + seconds - rest });
    now += seconds;
  };
  move("begin", -1, 0.5);
  for (let index = 0; index < cut; index += 1) {
    const pace = index === 0 ? 1 : PACE[cut];
    for (const phase of Object.keys(SECONDS)) {
      const over = !fits(cut, measured) && phase === "forward" ? passes(curve(cut, index, phase, measured)) : 1;
      move(phase, index, SECONDS[phase] * pace * over, RESTS[phase] * pace);
      if (over === 1) continue;
      move("overflow", index, 2.4, 2);
      return { moves, end: now };
    }
  }
  move("agree", cut - 1, 1.2, 0.6);
  move("step", cut - 1, 1.7, 0.5);
  return { moves, end: now };
}

// How far through a curve the limit is passed.
function passes(points) {
  const index = points.findIndex((point) => sum(point) > LIMIT);
  const [low, high] = [sum(points[index - 1]), sum(points[index])];
  return (index - 1 + (LIMIT - low) / (high - low)) / (points.length - 1);
}

// Everything that the picture and the words need.
export function stateAt(cut, t, measured) {
  const { moves, end } = plan(cut, measured);
  const seconds = (Math.max(0, Math.min(LAST, t)) / LAST) * end;
  const at = Math.max(0, moves.findLastIndex(({ from }) => from <= seconds + 1e-9));
  const { phase, index, from, to } = moves[at];
  const share = within((seconds - from) / (to - from));
  const upTo = (name) => (phase === name ? share : order(phase) > order(name) ? 1 : 0);
  const over = phase === "overflow" ? moves[at - 1] : null;
  const full = over && passes(curve(cut, index, "forward", measured));
  const forward = over ? full : upTo("forward");
  const memory = phase === "begin" || phase === "take" ? curve(cut, Math.max(0, index), "forward", measured)[0]
    : phase === "forward" ? between(curve(cut, index, "forward", measured), share * (fits(cut, measured) ? 1 : passes(curve(cut, index, "forward", measured))))
    : over ? between(curve(cut, index, "forward", measured), full)
    : between(curve(cut, index, "backward", measured), upTo("backward"));
  const { shares } = measured.shares.cuts[cut];
  const added = index < 0 || over ? 0 : index + eased(upTo("add"));
  const sums = Array.from({ length: NUMBERS }, (_, entry) =>
    shares.reduce((whole, each, number) => whole + each[entry] * within(added - number), 0));
  return {
    cut, t, phase, index, share, at, moves, end, seconds, memory, sums,
    rows: measured.reference.batch, total: sum(memory), need: need(cut, measured), atOnce: need(1, measured),
    take: upTo("take"), forward: phase === "forward" && !fits(cut, measured) ? share * passes(curve(cut, index, "forward", measured)) : forward,
    backward: over ? 0 : upTo("backward"), fly: phase === "add" ? share : 0, flying: index < 0 ? [] : shares[index],
    done: over || index < 0 ? 0 : index + (order(phase) >= order("add") && (phase !== "add" || share === 1) ? 1 : 0),
    overflow: over ? share : null, agreed: order(phase) > order("add") && !over, stepped: phase === "step" ? eased(share) : 0,
    whole: measured.shares.whole, apart: measured.shares.cuts[cut].apart,
  };
}

const ORDER = ["begin", "take", "forward", "overflow", "backward", "add", "agree", "step"];
const order = (phase) => ORDER.indexOf(phase);

// Where a move begins, as a moment.
export const momentOf = (cut, number, measured) => {
  const { moves, end } = plan(cut, measured);
  const { from, to } = moves[Math.max(0, Math.min(moves.length - 1, number))];
  // Its middle: a still picture of a move shows it under way; the last one shows its end.
  return number >= moves.length - 1 ? LAST : number <= 0 ? 0 : Math.round(((from + to) / 2 / end) * LAST);
};

// The curve of the memory all through a step: pairs of a share of its time and bytes.
export function wholeCurve(cut, measured) {
  const { moves, end } = plan(cut, measured);
  return moves.flatMap(({ phase, index, from, to }) => {
    if (phase !== "forward" && phase !== "backward") return [];
    const points = curve(cut, index, phase, measured);
    const until = fits(cut, measured) ? 1 : passes(points);
    const steps = Math.max(2, Math.round(until * (points.length - 1)) + 1);
    return Array.from({ length: steps }, (_, step) => {
      const share = step / (steps - 1);
      return [(from + (to - from) * share) / end, sum(between(points, share * until))];
    });
  });
}

// -- the words --------------------------------------------------------------------------------------------------------

export function words(state) {
  const { cut, rows, phase, index, need: needed, atOnce, apart } = state;
  const size = rows / cut, which = cut === 1 ? "The batch" : `Microbatch ${index + 1} of ${cut}`;
  return {
    begin: cut === 1 ? `All ${rows} rows at once. A row is one example.` : `${rows} rows, cut into ${cut} microbatches of ${size}. The weights are frozen.`,
    take: `${which} goes into the model: ${count(size, "row")}.`,
    forward: "Forward: every layer keeps activations, for its backward.",
    backward: "Backward: layer by layer, activations are used and freed.",
    add: cut === 1 ? "The gradient is there." : `Its gradient, divided by ${cut}, is added.`,
    agree: cut === 1 ? "This is the whole batch’s gradient." : `All ${cut} shares together are the whole batch’s gradient, ${power(apart)} apart by rounding.`,
    step: `One step: the weights move, once. It took ${bytes(needed)} instead of ${bytes(atOnce)}.`,
    overflow: `Out of memory: ${cut === 1 ? `all ${rows} rows at once` : `microbatches of ${size}`} need ${bytes(needed)}, and the GPU has ${HAS}. Cut the batch.`,
  }[phase];
}

// What a run of the playground has told so far, as one record; a pure function of its events.

import { split } from "./phases.js";
import { bytes } from "./svg.js";

const NONE = { forwards: 0, backwards: 0, steps: 0 }; // of the step that is under way

export function begin(settings) {
  const planned = typeof settings.microbatch === "number" ? split(settings.batch, settings.microbatch).length : 1;
  return {
    settings, last: 0, kind: "started", ready: null, planned, event: null, seen: NONE, done: { microbatch: 0, step: 0 },
    steps: [], memory: null, peak: 0, overflow: null, retry: null, error: null, log: [],
  };
}

const ENDED = ["idle", "done", "stopped", "failed", "overflow"];

export const ended = (view) => ENDED.includes(view.kind);

// An event that is known already changes nothing, so a stream may begin again anywhere.
export function apply(view, event) {
  if (event.id <= view.last) return view;
  const next = { ...view, last: event.id, kind: event.kind };
  const note = (words) => { next.log = [...view.log.slice(-199), words]; };
  switch (event.kind) {
    case "ready":
      next.ready = event;
      break;
    case "encode": // a coupled loss: every microbatch goes forward once before the loss is known
    case "forward":
      next.event = { phase: event.kind, microbatch: event.index };
      next.seen = view.seen.steps ? NONE : view.seen;
      if (event.kind === "forward") next.seen = { ...next.seen, forwards: next.seen.forwards + 1 };
      break;
    case "microbatch":
      next.event = { phase: "backward", microbatch: event.index };
      next.seen = { ...view.seen, backwards: view.seen.backwards + 1 };
      next.planned = event.microbatches ?? next.planned;
      next.done = { ...view.done, microbatch: view.done.microbatch + 1 };
      break;
    case "step":
      next.event = { phase: "step", microbatch: event.microbatches };
      next.seen = { ...view.seen, steps: 1 };
      next.planned = event.microbatches;
      next.done = { ...view.done, step: view.done.step + 1 };
      next.steps = [...view.steps, event];
      next.memory = { ...event.memory, total: event.peak_bytes };
      next.peak = Math.max(view.peak, event.peak_bytes);
      next.overflow = null;
      if (event.step < 3 || (event.step + 1) % 10 === 0) note(`Step ${event.step + 1}: loss ${digits(event.loss)}, ${event.microbatches} microbatches.`);
      break;
    case "retry":
      next.overflow = needed(event);
      next.retry = event;
      next.event = null;
      next.seen = NONE;
      next.planned = split(view.settings.batch, event.after).length;
      note(`Step ${event.step + 1}: memory ran out in microbatch ${event.index + 1}, which needs ${bytes(needed(event).total)}. Everything is put back; microbatches of ${event.after} instead of ${event.before}.`);
      break;
    case "overflow":
      next.overflow = needed(event);
      next.error = event.error;
      note(event.error);
      break;
    case "plan":
      note(`Microbatches of ${event.microbatch_size} from now on: ${event.why}.`);
      break;
    case "size":
      note(`Microbatches of ${event.after} instead of ${event.before}: ${event.reason}.`);
      break;
    case "failed":
      next.error = event.error;
      note(event.error);
      break;
    case "stopped":
      note("Stopped.");
      break;
  }
  return next;
}

// What an attempt that overflowed needs, as it was measured without a budget.
const needed = (event) => ({ ...(event.need_memory ?? event.memory), total: event.need_bytes ?? event.peak_bytes, rows: event.rows });

export const digits = (value) => (value === null || value === undefined ? "not finite" : value.toPrecision(4));

// What the badge says of the newest step.
export function badge(view) {
  const step = view.steps.at(-1);
  if (!step) return null;
  const right = step.error <= step.tolerance;
  return { right, error: step.error, tolerance: step.tolerance, scale: step.scale };
}

// How much of what was planned is done, from 0 to 1.
export const progress = ({ settings, done, kind }) => (kind === "done" ? 1 : Math.min(1, done.step / (settings.steps || 1)));

export function status(view) {
  const { settings, steps } = view;
  const step = steps.at(-1);
  const so = step ? `step ${step.step + 1} of ${settings.steps}, loss ${digits(step.loss)}, ${step.per_second.toFixed(0)} rows a second` : "";
  return {
    idle: "Nothing runs yet.",
    started: "Starting: a process of its own loads the library and the data.",
    ready: `Training ${(view.ready?.parameters ?? 0).toLocaleString("en")} parameters.`,
    done: `Finished: ${so}.`,
    stopped: `Stopped${so ? ` at ${so}` : ""}.`,
    overflow: "Overflow: the memory budget was passed, and nothing was learnt from this batch.",
    failed: `It failed: ${view.error}`,
    retry: `Overflow in step ${(view.retry?.step ?? 0) + 1}: starting again in microbatches of ${view.retry?.after}.`,
  }[view.kind] ?? (so ? `Running: ${so}.` : "Running: the first step.");
}

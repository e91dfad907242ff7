// The loop as a list of events. Every picture and every line of code follows from one index into it.

// What a microbatch goes through; `data-phase` of a line of code is one of these, or "begin" or "step".
export const PHASES = ["take", "forward", "backward"];

export function split(batch, microbatch) {
  const sizes = [];
  for (let left = batch; left > 0; left -= microbatch) sizes.push(Math.min(left, microbatch));
  return sizes;
}

export function events(microbatches) {
  const list = [{ phase: "begin", microbatch: -1 }];
  for (let microbatch = 0; microbatch < microbatches; microbatch += 1)
    for (const phase of PHASES) list.push({ phase, microbatch });
  list.push({ phase: "step", microbatch: microbatches });
  return list;
}

export const indexOf = (microbatch, phase) => 1 + microbatch * PHASES.length + PHASES.indexOf(phase);

// How many forwards, backwards and optimizer steps have happened, the event of the index included.
export function tally(list, index) {
  const seen = list.slice(0, index + 1);
  const of = (phase) => seen.filter((event) => event.phase === phase).length;
  return { forwards: of("forward"), backwards: of("backward"), steps: of("step") };
}

// What an event does, in words.
export function say(event, microbatches) {
  const number = `${event.microbatch + 1} of ${microbatches}`;
  return {
    begin: "The window opens: no gradient yet, and the weights are frozen.",
    take: `Microbatch ${number} is taken.`,
    encode: `Microbatch ${number} is encoded; nothing is kept but its representations.`,
    forward: `Microbatch ${number} goes forward; its activations fill the memory.`,
    backward: `Microbatch ${number} goes backward: its gradient is added, its activations are gone.`,
    step: "One optimizer step moves the weights, once; the gradient is let go.",
  }[event.phase];
}

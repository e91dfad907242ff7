// The playground: a form, a run of the server's, and four pictures of what it tells.

import { errorPane, lossPane, loopPane, tankPane } from "./panes.js";
import { show } from "./readout.js";
import { apply, badge, begin, ended, progress, status } from "./runs.js";
import { split } from "./phases.js";
import { filled, nameOf, presetOf, read, readAddress, sameSettings, writeAddress } from "./state.js";
import { percent, power } from "./svg.js";

const PANES = { loop: loopPane, tank: tankPane, loss: lossPane, error: errorPane };
const OTHERS = ["hero", "loop", "code"]; // what the address says of figures

// Call once, when something is first seen.
function firstSeen(element, then) {
  const seen = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting) return;
    seen.disconnect();
    then();
  }, { threshold: 0.2 });
  seen.observe(element);
}

export function startPlayground({ fields, presets, notices, recorded }) {
  const place = document.getElementById("playground");
  const find = (name) => place.querySelector(`[data-${name}]`);
  find("play").hidden = false;
  const form = find("form"), run = find("run"), stop = find("stop"), recover = find("recover"), notice = find("notice");
  let view = null, recording = null, byItself = false, source = null, name = null, dirty = false, replaying = 0;

  // -- what is shown ------------------------------------------------------------------------------------------------

  function draw() {
    dirty = false;
    const stands = !view.steps.length && !ended(view) && recording?.steps.length;
    const told = stands ? recording : view;
    for (const [pane, drawn] of Object.entries(PANES)) show(place.querySelector(`[data-pane="${pane}"]`), drawn(told), { late: true });
    find("results").hidden = view.kind === "idle"; // nothing to show yet
    const title = view.kind === "idle" ? "" : nameOf(fields, presets, told.settings, (name, value) => place.querySelector(`#f-${name} [value="${value}"]`)?.textContent ?? value);
    find("shown").textContent = stands ? `A recorded run, until yours has taken its first step. ${title}` : title;
    age();
    const words = `${byItself && !ended(view) ? "Started by itself, as an example. " : ""}${status(view)}`;
    if (find("status").textContent !== words) find("status").textContent = words;
    const seen = badge(told);
    find("badge").hidden = !seen;
    if (seen) {
      find("badge").classList.toggle("wrong", !seen.right);
      find("badge").dataset.error = seen.error;
      find("badge").dataset.tolerance = seen.tolerance;
      const scale = Math.abs(seen.scale - 1) > 0.02 ? `, × ${seen.scale.toFixed(2)} as large` : "";
      find("badge").textContent = seen.right
        ? `✓ This is the whole batch’s gradient, to ${power(seen.error)}.`
        : `✗ This is not the whole batch’s gradient: ${percent(seen.error)} off${scale}.`;
    }
    find("progress").value = progress(view);
    const log = find("log");
    log.replaceChildren(...view.log.map((words) => Object.assign(document.createElement("li"), { textContent: words })));
    place.dataset.microbatches = view.done.microbatch;
    place.dataset.steps = view.done.step;
    place.dataset.kind = view.kind;
    if (name) place.dataset.runName = name;
    const running = !ended(view);
    run.disabled = running && !recorded;
    stop.disabled = !running;
    recover.hidden = view.kind !== "overflow" || recorded;
  }

  // Results of settings that the form does not show any more are grey, and say so.
  function age() {
    const old = !recorded && view.kind !== "idle" && !sameSettings(fields, view.settings, values().found);
    find("results").classList.toggle("old", old);
    find("stale").hidden = !old;
  }

  // However much is told, a picture is drawn once a frame; while nothing is told, none is.
  function redraw() {
    if (dirty) return;
    dirty = true;
    requestAnimationFrame(draw);
  }

  for (const twin of place.querySelectorAll(".twin")) twin.addEventListener("toggle", () => view && redraw());

  function say(words) {
    notice.hidden = !words;
    notice.textContent = words ?? "";
  }

  // -- the form and the address -------------------------------------------------------------------------------------

  const control = (name) => form.elements.namedItem(name);

  function mark(chosen) {
    for (const each of place.querySelectorAll("[data-preset]")) each.setAttribute("aria-pressed", String(each.dataset.preset === chosen));
    find("preset-text").textContent = presets[chosen]?.text ?? "";
  }

  function fill(values) {
    if (recorded) return;
    for (const name of Object.keys(fields)) control(name).value = values[name];
    fit();
    mark(presetOf(fields, presets, values));
  }

  // 32 = 4 × 8: what the two knobs make together.
  function cutting() {
    const { found } = values(), { batch, microbatch } = found;
    const sizes = typeof microbatch === "number" && batch && microbatch <= batch ? split(batch, microbatch) : null;
    find("cutting").textContent = !sizes ? (microbatch === "auto" ? "the fastest size is found" : "")
      : sizes.at(-1) === microbatch ? `${batch} = ${sizes.length} × ${microbatch}` : `${batch} = ${sizes.length - 1} × ${microbatch} + ${sizes.at(-1)}`;
  }

  // A field of one model alone is not there for the others.
  function fit() {
    for (const field of form.querySelectorAll("[data-of]")) {
      const [{ name }] = field.querySelectorAll("select, input");
      field.hidden = field.dataset.of !== control("model").value;
      if (field.hidden) control(name).value = fields[name].default;
    }
    cutting();
  }

  function values() {
    const found = {}, problems = [];
    for (const [name, field] of Object.entries(fields)) {
      const { value, problem } = read(field, control(name).value);
      control(name).setAttribute("aria-invalid", problem ? "true" : "false");
      if (problem) problems.push(problem);
      else found[name] = value;
    }
    return { found, problems };
  }

  function address() {
    const { found } = values();
    mark(presetOf(fields, presets, found));
    age();
    const kept = Object.fromEntries([...new URLSearchParams(location.search)].filter(([key]) => OTHERS.includes(key)));
    const query = writeAddress(fields, found, kept);
    history.replaceState(null, "", `${query ? `?${query}` : location.pathname}${location.hash}`);
    program(writeAddress(fields, found));
  }

  async function program(query) {
    const answer = await ask(`api/program?${query}`);
    if (answer.program) document.querySelector('[data-copy-text="program"]').textContent = answer.program;
  }

  // -- the server ---------------------------------------------------------------------------------------------------

  async function ask(url, body) {
    const options = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    try {
      const answer = await fetch(url, options);
      const told = await answer.json();
      return answer.ok ? told : { problem: told.error };
    } catch {
      return { problem: "The server does not answer; start it again with: microbatch guide" };
    }
  }

  function listen(started) {
    source?.close();
    name = started.name;
    recording = null;
    view = begin(started.settings);
    source = new EventSource(`api/runs/${name}/events`);
    source.onmessage = ({ data }) => {
      for (const event of JSON.parse(data)) view = apply(view, event);
      redraw();
    };
    source.addEventListener("end", () => source.close());
    source.onerror = async () => {
      if (source.readyState !== EventSource.CLOSED && (await ask("api/run")).problem) {
        source.close();
        view = { ...view, kind: "failed", error: "the server does not answer any more; start it again with: microbatch guide" };
        redraw();
      }
    };
    redraw();
  }

  async function start({ itself = false } = {}) {
    const { found, problems } = values();
    if (problems.length) {
      say(problems.join(". "));
      const wrong = form.querySelector('[aria-invalid="true"]');
      if (wrong.closest("details")) wrong.closest("details").open = true;
      form.querySelector('[aria-invalid="true"]').focus();
      return;
    }
    say(null);
    address();
    run.disabled = true;
    const answer = await ask("api/runs", found);
    run.disabled = Boolean(answer.run);
    if (answer.problem) say(answer.problem);
    else {
      byItself = itself;
      listen(answer.run);
      stop.disabled = false;
      if (itself) return standIn();
      stop.focus({ preventScroll: true });
      reveal();
    }
  }

  // The process of the first run may still be loading: a recorded run is shown as long.
  async function standIn() {
    const own = name, { settings, events = [] } = await ask("static/recorded.json");
    for (const event of events) {
      if (name !== own || view.steps.length) return;
      recording = apply(recording ?? begin(settings), event);
      if (!recording.steps.length) continue;
      redraw();
      await new Promise((done) => setTimeout(done, 100));
    }
  }

  // A preset runs at once: what is under way makes room for it.
  async function startOver() {
    const turn = ++replaying;
    if (name && !ended(view)) await ask(`api/runs/${name}/stop`, {});
    if (turn === replaying) await start();
  }

  // Where the form takes the whole window, what it began is out of sight.
  function reveal() {
    const { top } = find("results").getBoundingClientRect();
    if (top > innerHeight * 0.8) find("results").scrollIntoView();
  }

  // -- a recorded run -----------------------------------------------------------------------------------------------

  async function replay(preset) {
    const turn = ++replaying;
    mark(preset);
    const within = document.getElementById("recorded"); // one file holds its runs itself
    const answer = within ? JSON.parse(within.textContent)[preset] ?? { problem: "none" } : await ask(`recorded/${preset}.json`);
    if (answer.problem) return say("This recording cannot be read.");
    view = begin(answer.settings);
    document.querySelector('[data-copy-text="program"]').textContent = answer.program;
    for (const event of answer.events) {
      if (turn !== replaying) return;
      view = apply(view, event);
      redraw();
      await new Promise((done) => setTimeout(done, Math.min(60, 6000 / answer.events.length)));
    }
  }

  // -- what the reader does -----------------------------------------------------------------------------------------

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!recorded) start();
  });
  form.addEventListener("change", () => !recorded && (fit(), address()));
  form.addEventListener("input", () => !recorded && (age(), cutting()));
  stop.addEventListener("click", async () => {
    if (recorded) {
      replaying += 1;
      view = apply(view, { id: view.last + 1, kind: "stopped" });
      return redraw();
    }
    stop.disabled = true;
    run.focus({ preventScroll: true });
    const answer = await ask(`api/runs/${name}/stop`, {});
    if (answer.problem) say(answer.problem);
  });
  recover.addEventListener("click", () => {
    control("recover").value = "yes";
    start();
  });
  for (const button of place.querySelectorAll("[data-preset]"))
    button.addEventListener("click", () => {
      if (recorded) return replay(button.dataset.preset);
      fill(filled(fields, presets[button.dataset.preset].settings));
      address();
      startOver();
    });

  // -- how it begins ------------------------------------------------------------------------------------------------

  async function resume(read) {
    if (recorded) {
      run.hidden = true;
      return;
    }
    const { run: under } = await ask("api/run");
    if (!under || name) return; // or a run was begun in the meantime
    listen(under);
    if (under.running && !read) fill(under.settings);
  }

  view = begin(filled(fields));
  view.kind = "idle";
  draw();
  const { values: asked, notices: unknown } = readAddress(fields, location.search, { others: OTHERS, presets });
  fill(asked);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (recorded) {
    const named = new URLSearchParams(location.search).get("preset");
    if (Object.hasOwn(presets, named)) replay(named);
    else if (!still) firstSeen(run.closest(".bar"), () => replaying || replay(Object.keys(presets)[0]));
  } else program(writeAddress(fields, asked));
  const all = [...notices, ...unknown];
  if (all.length) say(all.join(" "));
  resume(location.search.length > 1).then(() => {
    if (!recorded && !still) firstSeen(run.closest(".bar"), () => name || replaying || run.disabled || start({ itself: true }));
  });
}

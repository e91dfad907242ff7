// The page's address holds the state: a typed table reads it, and what it cannot read is said, not guessed.

export function read(field, value) {
  const text = String(value).trim();
  if (field.choices) return field.choices.includes(text) ? { value: text } : { problem: `${field.label} must be one of ${field.choices.join(", ")}` };
  if (field.word !== null && text === field.word) return { value: text };
  const number = text === "" ? NaN : Number(text);
  const fine = Number.isFinite(number) && number >= field.low && number <= field.high && (!field.whole || Number.isInteger(number));
  if (fine) return { value: number };
  const kind = field.whole ? "a whole number" : "a number";
  return { problem: `${field.label} must be ${kind} from ${field.low} to ${field.high}${field.word === null ? "" : ` or “${field.word}”`}` };
}

// What a preset sets, and of the rest the defaults.
export const filled = (fields, settings = {}) => ({ ...Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.default])), ...settings });

// The preset that values are; none where a reader has changed one of its settings.
export const presetOf = (fields, presets, values) => Object.keys(presets).find((preset) =>
  Object.entries(filled(fields, presets[preset].settings)).every(([name, value]) => String(values[name]) === String(value)));

export const sameSettings = (fields, one, other) => Object.keys(fields).every((name) => String(one[name]) === String(other[name]));

// What a result is of, in one line: the preset's name, the cut and the rate, and whatever else is not as usual.
// `said` is how a reader was asked for a value.
export function nameOf(fields, presets, values, said = (_, value) => value) {
  // However many steps of it were run: a recording has fewer.
  const named = Object.keys(presets).find((preset) => {
    const whole = filled(fields, presets[preset].settings);
    return presetOf(fields, { [preset]: presets[preset] }, { ...values, ...("steps" in whole && { steps: whole.steps }) });
  });
  const preset = presets[named]?.title;
  const { batch, microbatch, lr } = values;
  const cut = typeof microbatch !== "number" ? `${batch} rows, microbatches of a size that is found`
    : batch % microbatch ? `${batch} rows in microbatches of ${microbatch}` : `${batch} = ${batch / microbatch} × ${microbatch} rows`;
  const others = Object.entries(fields).filter(([name, field]) => !["batch", "microbatch", "lr", "compare", "pace", "steps"].includes(name)
    && String(values[name]) !== String(field.default)).map(([name, field]) => `${field.label[0].toLowerCase()}${field.label.slice(1)}: ${said(name, values[name])}`);
  return [preset ? `${preset}: ${cut}` : cut, `learning rate ${lr}`, ...others].join(", ");
}

// Every field's value, and a notice for each name or value that is not known. A preset comes first, whatever the order.
export function readAddress(fields, search, { others = [], presets = {} } = {}) {
  const preset = new URLSearchParams(search).get("preset");
  const values = filled(fields, Object.hasOwn(presets, preset) ? presets[preset].settings : {});
  const notices = [];
  if (preset !== null && !Object.hasOwn(presets, preset)) notices.push(`The address names a preset that does not exist: ${preset.slice(0, 40)}.`);
  for (const [name, text] of new URLSearchParams(search)) {
    if (name === "preset" || others.includes(name)) continue;
    if (!Object.hasOwn(fields, name)) {
      notices.push(`The address names a setting that does not exist: ${name.slice(0, 40)}.`);
      continue;
    }
    const { value, problem } = read(fields[name], text);
    if (problem) notices.push(`${problem}, not “${text.slice(0, 40)}”; ${fields[name].default} is used.`);
    else values[name] = value;
  }
  return { values, notices };
}

// Only what differs from the default is written.
export function writeAddress(fields, values, others = {}) {
  const query = new URLSearchParams();
  for (const [name, field] of Object.entries(fields))
    if (values[name] !== undefined && String(values[name]) !== String(field.default)) query.set(name, String(values[name]));
  for (const [name, value] of Object.entries(others)) if (value !== undefined) query.set(name, String(value));
  return query.toString();
}

// A moment of the stage, written as the number of microbatches and the thousandth of the step.
export function readMoment(search, name, { cuts, last }) {
  const text = new URLSearchParams(search).get(name);
  if (text === null) return {};
  const [, cut, t] = (/^(\d{1,2})-(\d{1,4})$/.exec(text) ?? []).map(Number);
  if (cuts.includes(cut) && t <= last) return { cut, t };
  return { notice: `The address asks for the moment ${text.slice(0, 20)} of “${name}”, which has none such; it begins where it always does.` };
}

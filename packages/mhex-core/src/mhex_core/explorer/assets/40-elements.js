// Elements: how they are made, and the few kinds that come up everywhere.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  previous: "M10 3 5 8l5 5",
  next: "M6 3l5 5-5 5",
  right: "M3 8.5 6.5 12 13 4.5",
  wrong: "M4 4l8 8M12 4l-8 8",
  close: "M4 4l8 8M12 4l-8 8",
  only: "M8 2.5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11M8 7.4a.6.6 0 1 0 0 1.2.6.6 0 0 0 0-1.2",
  compare: "M2 3h5v10H2zM9 3h5v10H9z",
  theme: "M8 2.5a5.5 5.5 0 1 0 0 11zM8 2.5a5.5 5.5 0 0 1 0 11",
  help: "M5.6 6a2.4 2.4 0 1 1 3.4 2.2c-.7.4-1 .8-1 1.6M8 12.2v.3",
  about: "M8 7v5M8 4v.4",
  search: "M7 2.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9M10.2 10.2 14 14",
  reset: "M3 8a5 5 0 1 0 1.6-3.7L3 5.8M3 2.6v3.2h3.2",
};

/** An element with properties (`class`, `on` for listeners, `data`, attributes) and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [type, listener] of Object.entries(value)) element.addEventListener(type, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A drawing of 16 x 16 units. It says nothing to a screen reader: what it stands beside does. */
function icon(name) {
  const drawing = makeSvg("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" });
  drawing.append(makeSvg("path", { d: ICONS[name] }));
  return drawing;
}

function makeSvg(tag, attributes = {}) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** A button that shows an icon, and whose name is read and shown when pointed at. */
function iconButton(name, label, press, properties = {}) {
  return make(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click: press }, ...properties },
    icon(name),
  );
}

/** A name that somebody gave: its direction of writing stays its own. */
function given(name, properties = {}) {
  return make("bdi", properties, name);
}

/** A select with a label: options are pairs of value and text. */
function choice(label, options, change, properties = {}) {
  const select = make("select", { "aria-label": label, on: { change: () => change(select.value) }, ...properties });
  setOptions(select, options);
  return { element: make("label", { class: "choice" }, make("span", {}, label), select), select };
}

const optionsOf = new WeakMap();

function setOptions(select, options) {
  const now = JSON.stringify(options);
  if (optionsOf.get(select) === now) return;
  optionsOf.set(select, now);
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
}

/** A slider with its name and what it stands at. `shown` says a value in words. */
function slider({ label, low = 0, high = 1, step = 0.01, shown = fixed, change, describedBy = null }) {
  const range = make("input", {
    type: "range",
    min: low,
    max: high,
    step,
    "aria-label": label,
    "aria-describedby": describedBy,
  });
  const output = make("output", { class: "number" });
  const set = (value) => {
    if (document.activeElement !== range || Math.abs(Number(range.value) - value) > step) range.value = value;
    range.style.setProperty("--filled", `${(100 * (value - low)) / (high - low)}%`);
    range.setAttribute("aria-valuetext", shown(value));
    output.textContent = shown(value);
  };
  range.addEventListener("input", () => change(Number(range.value)));
  const element = make("div", { class: "slider" }, make("span", { class: "slider-name" }, label), output, range);
  return { element, range, output, set };
}

/** Two or more choices beside one another, of which one is taken. */
function segments(label, name, options, change) {
  const inputs = options.map(([value]) =>
    make("input", { type: "radio", name, value, on: { change: () => change(value) } }),
  );
  const element = make(
    "fieldset",
    { class: "segments" },
    make("legend", {}, label),
    options.map(([, text], index) => make("label", {}, inputs[index], make("span", {}, text))),
  );
  const set = (value) => {
    for (const input of inputs) input.checked = input.value === value;
  };
  return { element, inputs, set };
}

/** A mark for right or wrong, told by shape, colour and word. */
function mark(verdict) {
  if (verdict === "unknown") return null;
  return make(
    "span",
    { class: `mark ${verdict}`, title: verdict },
    icon(verdict),
    make("span", { class: "unseen-text" }, verdict),
  );
}

function fixed(value) {
  return (Math.round(100 * value) / 100).toFixed(2);
}

/** A number to four digits, with a real minus. */
function digits(value) {
  const text =
    value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
      ? value.toExponential(2)
      : String(+value.toPrecision(4));
  return text.replace("-", "\u2212");
}

/** A score with its sign, to three digits. */
function withSign(value) {
  const sign = value < 0 ? "\u2212" : "+";
  return sign + digits(+Math.abs(value).toPrecision(3));
}

function percent(value) {
  return value === null ? "" : `${(100 * value).toFixed(1)} %`;
}

function counted(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** Say something to a screen reader, and nothing to others. */
function announce(text) {
  const place = document.getElementById("announcement");
  if (place && place.textContent !== text) place.textContent = text;
}

/** What the reader is told in one sentence when something fails. */
function sentence(fault) {
  return fault instanceof Told ? fault.message : "Something in this page failed; another browser may show it.";
}

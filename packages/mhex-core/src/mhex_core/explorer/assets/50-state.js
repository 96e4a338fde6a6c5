// What is shown at the moment: one or two panes, and how maps are drawn. It is kept in the address, so that a link shows
// the same again.
//
// A pane is { sample, method, place, settings }: place is that of the evidence in its sample, settings hold beta and
// weights of each method, since layers differ from method to method.

const BOTH = "both";

const state = {
  panes: [],
  active: 0,
  linked: true, // whether sliders act on both panes
  opacity: 0.6,
  colours: "inferno",
  threshold: 0, // 0: no outline
  unit: "words",
};

const listeners = { change: [], settle: [] };
let waiting = null; // for the next frame

/** The settings a method comes with. */
function defaults(method) {
  return { beta: page.methods[method].beta, weights: [...page.methods[method].layer_weights] };
}

function makePane(sample, method = null, settings = null) {
  const evidence = page.samples[sample].evidence;
  const by = evidence.some((one) => one.method === method) ? method : evidence[0].method;
  const kept = settings ?? page.methods.map((_, index) => defaults(index));
  return { sample, method: by, place: evidence.findIndex((one) => one.method === by), settings: kept };
}

function copied(pane) {
  return { ...pane, settings: pane.settings.map(({ beta, weights }) => ({ beta, weights: [...weights] })) };
}

const sampleOf = (pane) => page.samples[pane.sample];
const methodOf = (pane) => page.methods[pane.method];
const settingsOf = (pane) => pane.settings[pane.method];
const targetOf = (pane) => sampleOf(pane).evidence[pane.place].target;

/** Show another sample in a pane, by the same method where it has one. */
function showSample(sample, number = state.active) {
  const pane = state.panes[number];
  if (pane.sample === sample) return;
  state.panes[number] = makePane(sample, pane.method, pane.settings);
  changed();
}

/** Show a class by a method; where the sample has no evidence of it, the method's first class. */
function showEvidence(number, method, target) {
  const pane = state.panes[number];
  const offered = evidenceOf(sampleOf(pane), method);
  pane.method = method;
  pane.place = offered.find((place) => sampleOf(pane).evidence[place].target === target) ?? offered[0];
  changed();
}

/** The panes that the sliders act on. */
function steered() {
  return state.linked ? state.panes : [state.panes[state.active]];
}

/** Change beta or weights of the panes that are steered, as far as they have the same layers as the active one. */
function steer(change) {
  const leader = methodOf(state.panes[state.active]);
  for (const pane of steered()) {
    if (methodOf(pane).layer_names.length === leader.layer_names.length) change(settingsOf(pane), pane);
  }
  changed();
}

function setBeta(beta) {
  for (const pane of steered().filter((pane) => !methodOf(pane).fixed)) settingsOf(pane).beta = rounded(Math.min(1, Math.max(0, beta)));
  changed();
}

function setWeight(layer, weight) {
  steer((settings) => {
    settings.weights[layer] = weight;
  });
}

function setOnly(layer) {
  steer((settings) => {
    settings.weights = settings.weights.map((_, index) => Number(index === layer));
  });
}

function resetWeights() {
  steer((settings, pane) => {
    settings.weights = defaults(pane.method).weights;
  });
}

function resetAll() {
  steer((settings, pane) => Object.assign(settings, defaults(pane.method)));
}

/** Without the last digits that adding up hundredths leaves. */
function rounded(value) {
  return Math.round(1e4 * value) / 1e4;
}

function toggleCompare() {
  if (page.compact) return;
  if (state.panes.length === 1) state.panes.push(copied(state.panes[0]));
  else state.panes.splice(1 - state.active, 1);
  state.active = state.panes.length - 1;
  changed();
}

/** Draw anew with the next frame, once, however often it is asked for. */
function changed() {
  waiting ??= requestAnimationFrame(() => {
    waiting = null;
    for (const listener of listeners.change) listener();
    keepAddress();
  });
}

function addressOf() {
  const fields = new URLSearchParams();
  state.panes.forEach((pane, number) => {
    const end = number ? "2" : "";
    const { beta, weights } = settingsOf(pane);
    fields.set(`s${end}`, pane.sample);
    if (page.methods.length > 1) fields.set(`m${end}`, pane.method);
    fields.set(`t${end}`, targetOf(pane));
    fields.set(`b${end}`, +beta.toFixed(4));
    fields.set(`w${end}`, weights.map((weight) => +weight.toFixed(4)).join(","));
  });
  if (state.panes.length > 1) fields.set("l", Number(state.linked));
  if (page.kind === "images") {
    fields.set("o", state.opacity);
    fields.set("c", state.colours);
    if (state.threshold) fields.set("q", state.threshold);
  } else if (state.unit !== "words") fields.set("u", state.unit);
  return fields.toString().replaceAll("%2C", ",");
}

let addressTimer = null;
let knownAddress = location.hash;

// Browsers slow down pages that write their address with every movement of a slider.
function keepAddress() {
  if (page.compact) return;
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => {
    if (location.hash !== knownAddress) return; // a link was followed, and the event that says so is on its way
    try {
      history.replaceState(null, "", `#${addressOf()}`);
      knownAddress = location.hash;
    } catch {
      // A frame without an address of its own: there is no link to keep.
    }
  }, 150);
}

/** Take what an address says, as far as it fits the page; anything else keeps what it is by default. */
function readAddress() {
  knownAddress = location.hash;
  const fields = new URLSearchParams(location.hash.slice(1));
  const number = (name, low, high) => {
    const value = fields.get(name) === null || fields.get(name) === "" ? NaN : Number(fields.get(name));
    return value >= low && value <= high ? value : null;
  };
  const index = (name, count) => {
    const value = number(name, 0, count - 1);
    return Number.isInteger(value) ? value : null;
  };
  const read = (end) => {
    const pane = makePane(index(`s${end}`, page.samples.length) ?? 0, index(`m${end}`, page.methods.length));
    const target = number(`t${end}`, 0, Infinity);
    const evidence = sampleOf(pane).evidence;
    const place = evidence.findIndex((one) => one.method === pane.method && one.target === target);
    if (place >= 0) pane.place = place;
    const settings = settingsOf(pane);
    settings.beta = number(`b${end}`, 0, 1) ?? settings.beta;
    // Rounded numbers in an address must not move weights that nobody moved.
    const weights = (fields.get(`w${end}`) ?? "").split(",").map((text) => (text === "" ? NaN : Number(text)));
    if (weights.length === settings.weights.length && weights.every(Number.isFinite)) {
      settings.weights = weights.map((weight, layer) =>
        Math.abs(weight - settings.weights[layer]) < 1e-4 ? settings.weights[layer] : weight,
      );
    }
    return pane;
  };
  const panes = [read("")];
  if (!page.compact && fields.has("s2")) panes.push(read("2"));
  Object.assign(state, {
    panes,
    active: 0,
    linked: fields.get("l") !== "0",
    opacity: number("o", 0, 1) ?? state.opacity,
    colours: Object.hasOwn(SEQUENTIAL, fields.get("c") ?? "") ? fields.get("c") : state.colours,
    threshold: number("q", 0, 0.95) ?? 0,
    unit: fields.get("u") === "tokens" ? "tokens" : "words",
  });
}

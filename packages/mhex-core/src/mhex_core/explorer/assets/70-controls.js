// Controls: sliders for beta and each layer, how maps are drawn, and what can be taken along.

function makeControls() {
  const beta = slider({ label: "Evidence against, \u03b2", change: setBeta, describedBy: "beta-hint" });
  const layers = make("div", { class: "weights" });
  const layersHead = make(
    "div",
    { class: "group-head" },
    make("h3", {}, "Layer weights"),
    iconButton("reset", "Reset the layer weights", resetWeights),
  );
  const acts = segments(
    "Sliders act on",
    "acts",
    [
      ["0", "A"],
      ["1", "B"],
      [BOTH, "Both"],
    ],
    (value) => {
      state.linked = value === BOTH;
      if (!state.linked) state.active = Number(value);
      changed();
    },
  );
  const single = make("p", { class: "hint" });
  const against = make(
    "div",
    { class: "group" },
    beta.element,
    make(
      "p",
      { class: "hint", id: "beta-hint" },
      "0 shows what speaks for the class; 1 counts what speaks against it in full.",
    ),
  );
  const asPython = make("button", { type: "button", on: { click: copyPython } }, "Copy Python");
  const view = page.kind === "images" ? pictureControls() : textControls();
  const content = make(
    "section",
    { class: "controls", "aria-labelledby": "controls-title" },
    make("h2", { id: "controls-title" }, "Settings"),
    acts.element,
    against,
    make("div", { class: "group" }, layersHead, layers, single),
    view.element,
    make(
      "div",
      { class: "group actions" },
      make("button", { type: "button", on: { click: resetAll } }, "Reset all"),
      page.kind === "images" && !page.compact
        ? make("button", { type: "button", on: { click: savePicture } }, "Save PNG")
        : null,
      asPython,
      page.compact ? null : make("button", { type: "button", on: { click: copyLink } }, "Copy link"),
    ),
  );
  // On a narrow screen they are folded away at the bottom; elsewhere they are always there.
  const element = make("details", { class: "settings" }, make("summary", {}, "Settings"), content);
  const narrow = matchMedia(`(max-width: ${page.compact ? 720 : 1180}px)`);
  const unfold = () => {
    element.open = !narrow.matches;
    element.classList.toggle("folding", narrow.matches);
  };
  narrow.addEventListener("change", unfold);
  unfold();
  let rows = [];
  let made = "";

  function build(method) {
    const short = shortNames(method.layer_names);
    rows = method.layer_names.map((name, layer) => makeWeight(name, short[layer], layer, method.layer_weights[layer]));
    layers.replaceChildren(...rows.map((row) => row.element));
  }

  function update() {
    const pane = state.panes[state.active];
    const method = methodOf(pane);
    const settings = settingsOf(pane);
    const key = `${pane.method}`;
    if (key !== made) build(method);
    made = key;
    acts.element.hidden = state.panes.length < 2;
    acts.set(state.linked ? BOTH : String(state.active));
    beta.set(settings.beta);
    const many = method.layer_names.length > 1;
    layers.hidden = layersHead.hidden = !many;
    single.hidden = many;
    against.hidden = asPython.hidden = method.fixed;
    single.textContent = method.fixed ? "Shown as it was stored: layers are added up." : "This method has one map.";
    rows.forEach((row, layer) => row.set(settings.weights));
    view.update(method);
  }

  return { element, update, beta };
}

/** The slider, the number and the "only" of a layer. Sliders go from 0 to 2, and further where a weight does. */
function makeWeight(name, short, layer, weight) {
  const low = Math.min(0, Math.floor(weight));
  const high = Math.max(2, Math.ceil(weight));
  const bar = slider({
    label: name,
    low,
    high,
    shown: (value) => digits(rounded(value)),
    change: (value) => setWeight(layer, value),
  });
  bar.output.remove();
  const field = make("input", {
    type: "number",
    class: "number",
    step: 0.05,
    "aria-label": `Weight of ${name}`,
    on: {
      change: () => {
        if (field.value !== "" && Number.isFinite(field.valueAsNumber)) setWeight(layer, field.valueAsNumber);
        else changed();
      },
    },
  });
  const only = iconButton("only", `Only ${name}`, () => setOnly(layer), { "aria-pressed": "false" });
  bar.element.classList.add("weight");
  Object.assign(bar.element.querySelector(".slider-name"), { title: name, textContent: short });
  bar.element.append(field, only);
  return {
    element: bar.element,
    set(weights) {
      bar.set(weights[layer]);
      if (document.activeElement !== field || field.valueAsNumber !== weights[layer])
        field.value = rounded(weights[layer]);
      only.setAttribute(
        "aria-pressed",
        String(weights[layer] !== 0 && weights.every((value, index) => index === layer || value === 0)),
      );
    },
  };
}

function pictureControls() {
  const opacity = slider({
    label: "Opacity",
    change: (value) => {
      state.opacity = value;
      changed();
    },
  });
  const threshold = slider({
    label: "Outline at",
    high: 0.95,
    step: 0.05,
    shown: (value) => (value ? fixed(value) : "off"),
    change: (value) => {
      state.threshold = value;
      changed();
    },
  });
  const colours = choice("Colours", Object.entries(SEQUENTIAL), (value) => {
    state.colours = value;
    changed();
  });
  const hint = make("p", { class: "hint" }, "Red speaks for the class, blue against it.");
  const element = make(
    "div",
    { class: "group" },
    make("h3", {}, "Drawing"),
    opacity.element,
    threshold.element,
    colours.element,
    hint,
  );
  return {
    element,
    update(method) {
      opacity.set(state.opacity);
      threshold.set(state.threshold);
      colours.select.value = state.colours;
      const signed = state.panes.every((pane) => methodOf(pane).signed);
      colours.element.hidden = signed;
      hint.hidden = !method.signed;
    },
  };
}

function textControls() {
  const unit = segments(
    "Show",
    "unit",
    [
      ["words", "Words"],
      ["tokens", "Tokens"],
    ],
    (value) => {
      state.unit = value;
      changed();
    },
  );
  return { element: make("div", { class: "group" }, unit.element), update: () => unit.set(state.unit) };
}

// Beside the pictures or texts of a pane: the prediction, what each head says, and each layer alone.

/** The prediction, the most probable classes, what each head says, and the note. */
function makeFacts(number) {
  const predicted = make("p", { class: "predicted" });
  const bars = make("ul", { class: "bars" });
  const heads = make("div", { class: "fact", hidden: true });
  const note = make("p", { class: "note", hidden: true, dir: "auto" });
  const extra = make("div", { class: "fact wide", hidden: true });
  const element = make(
    "div",
    { class: "facts" },
    make("div", { class: "fact" }, make("h3", {}, "Prediction"), predicted, bars),
    heads,
    extra,
    note,
  );

  function draw({ pane, sample, evidence, result }) {
    const label =
      sample.label === null ? [] : [make("span", { class: "label" }, "true class ", given(className(sample.label)))];
    predicted.replaceChildren(
      make("strong", {}, given(className(sample.prediction))),
      ` ${percent(probability(sample, sample.prediction))} `,
      ...label,
    );
    bars.replaceChildren(...sample.probabilities.map(([index, share]) => bar(pane, sample, index, share)));
    heads.hidden = !sample.heads.length;
    heads.replaceChildren(make("h3", {}, "Heads"), headList(sample));
    note.hidden = !sample.note;
    note.textContent = sample.note;
    const listed = page.kind === "texts" ? strongestList(sample, result, evidence) : null;
    extra.hidden = listed === null;
    extra.replaceChildren(...(listed ?? []));
  }

  function bar(pane, sample, index, share) {
    const explained = index === targetOf(pane);
    const offered = evidenceOf(sample, pane.method).some((place) => sample.evidence[place].target === index);
    const tags = [index === sample.label ? "true" : null, explained ? "explained" : null].filter(Boolean);
    const parts = [
      make(
        "span",
        { class: "bar-name" },
        given(className(index), { title: className(index) }),
        tags.length ? make("small", {}, tags.join(", ")) : null,
      ),
      make("span", { class: "bar-track", "aria-hidden": "true" }, make("span", { style: `width:${100 * share}%` })),
      make("span", { class: "number" }, percent(share)),
    ];
    const choose = () => showEvidence(number, pane.method, index);
    return make(
      "li",
      {},
      offered
        ? make(
            "button",
            {
              type: "button",
              class: "bar",
              "aria-pressed": String(explained),
              title: "Explain this class",
              on: { click: choose },
            },
            parts,
          )
        : make("span", { class: "bar" }, parts),
    );
  }

  return { element, draw };
}

function headList(sample) {
  const named = page.methods.find((method) => method.layer_names.length === sample.heads.length);
  const short = named && shortNames(named.layer_names);
  return make(
    "ol",
    { class: "heads" },
    sample.heads.map(([index, share], head) => {
      const agrees = index === sample.prediction;
      return make(
        "li",
        { class: agrees ? "agrees" : "differs" },
        make(
          "span",
          { class: "head-name", title: named?.layer_names[head] ?? "" },
          short?.[head] ?? `head ${head + 1}`,
        ),
        given(className(index), { class: "head-class" }),
        make("span", { class: "number" }, percent(share)),
        make(
          "span",
          { class: "agreement", title: agrees ? "agrees with the prediction" : "differs from the prediction" },
          agrees ? "=" : "\u2260",
          make("span", { class: "unseen-text" }, agrees ? " agrees" : " differs"),
        ),
      );
    }),
  );
}

/** Each layer alone: a press shows only that one. */
function makeLayers(number) {
  const list = make("ul", { class: `layers ${page.kind}` });
  const element = make("div", { class: "strip" }, make("h3", {}, "Layers, each alone"), list);
  let made = "";
  let parts = [];

  function build(method) {
    const short = shortNames(method.layer_names);
    parts = method.layer_names.map((name, layer) => {
      const canvas = make("canvas", { "aria-hidden": "true" });
      const weight = make("span", { class: "number", "aria-hidden": "true" });
      const button = make(
        "button",
        {
          type: "button",
          class: "layer",
          "aria-label": `Only ${name}`,
          title: `Only ${name}`,
          on: {
            click: () => {
              activate(number);
              setOnly(layer);
            },
          },
        },
        canvas,
        make("span", { class: "layer-name" }, short[layer]),
        weight,
      );
      return { canvas, weight, button };
    });
    list.replaceChildren(...parts.map(({ button }) => make("li", {}, button)));
  }

  function draw({ pane, evidence, result }) {
    const method = methodOf(pane);
    const settings = settingsOf(pane);
    element.hidden = method.layer_names.length < 2;
    if (element.hidden) return;
    const key = method.layer_names.join("\n");
    if (key !== made) build(method);
    made = key;
    const strip =
      page.kind === "images" ? pictureStrip(evidence, method, settings, result) : textStrip(evidence, settings);
    const lit = settings.weights.flatMap((weight, layer) => (weight ? [layer] : []));
    parts.forEach(({ canvas, weight, button }, layer) => {
      strip(canvas, layer);
      weight.textContent = `\u00d7 ${digits(rounded(settings.weights[layer]))}`;
      button.setAttribute("aria-pressed", String(lit.length === 1 && lit[0] === layer));
      button.classList.toggle("off", !settings.weights[layer]);
    });
  }

  return { element, draw, focus: () => parts[0]?.button.focus() };
}

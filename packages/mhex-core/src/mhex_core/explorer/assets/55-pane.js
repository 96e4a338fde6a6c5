// A pane: one sample by one method for one class, with what was predicted and what each layer adds.

/** A pane's elements. `current` is what it shows: { pane, sample, evidence, result }, null while there is nothing. */
function makePaneView(number) {
  const letter = "AB"[number];
  const body = page.kind === "images" ? pictureBody(number) : textBody(number);
  const name = given("", { class: "sample-name", dir: "auto" });
  const badge = make("span", { class: "badge", "aria-hidden": "true" }, letter);
  const heading = make("h2", {}, badge, name);
  const verdict = make("span", { class: "verdict" });
  const samples = choice(
    "Sample",
    page.samples.map((sample, index) => [index, sample.name]),
    (value) => showSample(Number(value), number),
  );
  const method = choice("Method", [], (value) => showEvidence(number, Number(value), targetOf(state.panes[number])));
  const target = choice("Class explained", [], (value) =>
    showEvidence(number, state.panes[number].method, Number(value)),
  );
  const walk = make(
    "div",
    { class: "walk" },
    iconButton("previous", "Previous sample", () => step(-1, number)),
    iconButton("next", "Next sample", () => step(1, number)),
  );
  const fault = make("p", { class: "fault", role: "alert", hidden: true });
  const facts = makeFacts(number);
  const layers = makeLayers(number);
  const shown = make("div", { class: "shown" }, body.element, facts.element, layers.element);
  const element = make(
    "section",
    {
      class: "pane",
      "aria-label": `View ${letter}`,
      on: {
        focusin: () => activate(number),
        pointerdown: () => activate(number),
      },
    },
    make(
      "div",
      { class: "pane-head" },
      walk,
      heading,
      verdict,
      make("div", { class: "pane-choices" }, samples.element, method.element, target.element),
    ),
    fault,
    shown,
  );

  const view = { number, element, layers, body, current: null, turn: 0, update };

  function head(pane) {
    const sample = sampleOf(pane);
    const methods = [...new Set(sample.evidence.map((one) => one.method))];
    name.textContent = sample.name;
    badge.hidden = state.panes.length < 2;
    verdict.replaceChildren(...[mark(outcome(sample))].filter(Boolean));
    samples.element.hidden = page.samples.length < 2 || (!page.compact && state.panes.length < 2);
    samples.select.value = pane.sample;
    setOptions(
      method.select,
      methods.map((index) => [index, page.methods[index].name]),
    );
    method.select.value = pane.method;
    method.element.hidden = page.methods.length < 2;
    setOptions(
      target.select,
      evidenceOf(sample, pane.method).map((place) => {
        const index = sample.evidence[place].target;
        return [index, `${className(index)} \u00b7 ${percent(probability(sample, index))}`];
      }),
    );
    target.select.value = targetOf(pane);
    walk.hidden = page.samples.length < 2;
    element.classList.toggle("active", state.panes.length > 1 && (state.linked || state.active === number));
  }

  async function update() {
    const pane = state.panes[number];
    const turn = ++view.turn;
    element.hidden = !pane;
    if (!pane) {
      view.current = null;
      return;
    }
    head(pane);
    const sample = sampleOf(pane);
    try {
      const [evidence, picture] = await Promise.all([
        unpackedEvidence(sample, pane.place),
        page.kind === "images" ? pictureOf(sample) : null,
      ]);
      if (turn !== view.turn) return;
      const result = body.draw(pane, evidence, picture);
      view.current = { pane, sample, evidence, picture, result };
      facts.draw(view.current);
      layers.draw(view.current);
      show(null);
    } catch (error) {
      if (turn !== view.turn) return;
      view.current = null;
      if (!(error instanceof Told)) console.error(error);
      show(sentence(error));
    }
  }

  function show(message) {
    fault.hidden = message === null;
    fault.textContent = message ?? "";
    shown.hidden = message !== null;
  }

  return view;
}

/** The pane that was last touched is the one the sliders act on. */
function activate(number) {
  if (state.active === number || !state.panes[number]) return;
  state.active = number;
  changed();
}

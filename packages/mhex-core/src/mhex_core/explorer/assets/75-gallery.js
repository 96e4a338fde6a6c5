// The gallery: a card for each sample, and what narrows them down.

const THUMBNAIL = 160; // pixels
const SNIPPET = 160; // characters

const OUTCOMES = [
  ["all", "All"],
  ["right", "Right"],
  ["wrong", "Wrong"],
  ["unknown", "Unknown"],
];
const ORDERS = [
  ["order", "As given"],
  ["confident", "Most confident"],
  ["doubtful", "Least confident"],
  ["name", "Name"],
];

const confidence = (sample) => probability(sample, sample.prediction);

/** Samples that pass the filters, in order: places in the page. */
function filtered(filters) {
  const sought = filters.name.trim().toLocaleLowerCase();
  const kept = page.samples.flatMap((sample, index) => {
    const sure = confidence(sample);
    const passes =
      (filters.outcome === "all" || outcome(sample) === filters.outcome) &&
      (filters.label === "" || sample.label === Number(filters.label)) &&
      (filters.prediction === "" || sample.prediction === Number(filters.prediction)) &&
      sure >= filters.low &&
      sure <= filters.high + 1e-9 &&
      (!sought || sample.name.toLocaleLowerCase().includes(sought));
    return passes ? [index] : [];
  });
  const by = {
    confident: (one, other) => confidence(page.samples[other]) - confidence(page.samples[one]),
    doubtful: (one, other) => confidence(page.samples[one]) - confidence(page.samples[other]),
    name: (one, other) => page.samples[one].name.localeCompare(page.samples[other].name, undefined, { numeric: true }),
  }[filters.order];
  return by ? kept.sort(by) : kept;
}

function makeGallery() {
  const filters = { name: "", outcome: "all", label: "", prediction: "", low: 0, high: 1, order: "order" };
  const count = make("p", { class: "count" });
  const list = make("ul", { class: `cards ${page.kind}` });
  const cards = page.samples.map((sample, index) => makeCard(sample, index));
  const classes = (read) => [
    ["", "Any"],
    ...[...new Set(page.samples.map(read))]
      .filter((index) => index !== null)
      .sort((one, other) => one - other)
      .map((index) => [index, className(index)]),
  ];
  const search = make("input", {
    type: "search",
    placeholder: "Search names",
    "aria-label": "Search names",
    on: { input: () => set("name", search.value) },
  });
  const outcomes = segments("Outcome", "outcome", OUTCOMES, (value) => set("outcome", value));
  const labels = choice(
    "True class",
    classes((sample) => sample.label),
    (value) => set("label", value),
  );
  const predictions = choice(
    "Predicted",
    classes((sample) => sample.prediction),
    (value) => set("prediction", value),
  );
  const order = choice("Order", ORDERS, (value) => set("order", value));
  const low = slider({
    label: "Confidence from",
    shown: (value) => `${Math.round(100 * value)} %`,
    change: (value) => set("low", value, Math.min(value, filters.high)),
  });
  const high = slider({
    label: "Confidence to",
    shown: (value) => `${Math.round(100 * value)} %`,
    change: (value) => set("high", value, Math.max(value, filters.low)),
  });
  const clear = make("button", { type: "button", class: "clear", on: { click: clearAll } }, "Clear filters");
  const known = page.samples.some((sample) => sample.label !== null);
  outcomes.element.hidden = labels.element.hidden = !known;
  const element = make(
    "section",
    { class: "gallery", "aria-labelledby": "gallery-title" },
    make(
      "div",
      { class: "filters" },
      make(
        "div",
        { class: "group-head" },
        make("h2", { id: "gallery-title" }, page.kind === "images" ? "Images" : "Texts"),
        count,
      ),
      search,
      outcomes.element,
      make(
        "details",
        {},
        make("summary", {}, "Filter and sort"),
        make(
          "div",
          { class: "filter-grid" },
          labels.element,
          predictions.element,
          low.element,
          high.element,
          order.element,
          clear,
        ),
      ),
    ),
    list,
  );
  let shown = [];
  let drawn = "";

  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) if (entry.isIntersecting) fill(cards[Number(entry.target.dataset.sample)]);
    },
    { rootMargin: "240px" },
  );
  for (const card of cards) observer.observe(card.button);

  function set(name, value, allowed = value) {
    filters[name] = allowed;
    refresh();
  }

  function clearAll() {
    Object.assign(filters, { name: "", outcome: "all", label: "", prediction: "", low: 0, high: 1 });
    search.value = labels.select.value = predictions.select.value = "";
    refresh();
  }

  function refresh() {
    shown = filtered(filters);
    list.replaceChildren(...shown.map((index) => cards[index].item));
    outcomes.set(filters.outcome);
    low.set(filters.low);
    high.set(filters.high);
    const all = page.samples.length;
    count.textContent = shown.length === all ? `${all}` : `${shown.length} of ${all}`;
    announce(shown.length ? `${counted(shown.length, "sample")} shown` : "No sample passes these filters");
    list.classList.toggle("none", !shown.length);
  }

  /** Cards that are seen are painted one after the other, so that the page answers meanwhile. */
  let queue = Promise.resolve();
  function fill(card) {
    if (card.filled) return;
    card.filled = true;
    queue = queue.then(() => card.paint()).then(() => new Promise((resume) => setTimeout(resume)));
  }

  function update() {
    const chosen = new Set(state.panes.map((pane) => pane.sample));
    cards.forEach((card, index) => card.choose(chosen.has(index)));
    const key = `${state.colours} ${state.opacity}`;
    if (key === drawn || page.kind !== "images") return;
    if (drawn) {
      for (const card of cards) {
        card.filled = false;
        observer.unobserve(card.button);
        observer.observe(card.button);
      }
    }
    drawn = key;
  }

  /** The sample `by` places after another, among those that pass the filters. */
  function neighbour(sample, by) {
    const place = shown.indexOf(sample);
    if (place < 0) return shown[0];
    return shown[place + by];
  }

  refresh();
  return {
    element,
    update,
    neighbour,
    search,
    reveal: (index) => cards[index].item.isConnected && cards[index].reveal(),
  };
}

function makeCard(sample, index) {
  const picture = page.kind === "images" ? make("canvas", { width: 16, height: 16, "aria-hidden": "true" }) : null;
  const snippet =
    page.kind === "texts"
      ? make(
          "span",
          { class: "snippet", dir: "auto", lang: "" },
          sample.texts
            .flat()
            .map(([text]) => text)
            .join("")
            .slice(0, SNIPPET),
        )
      : null;
  const label =
    outcome(sample) === "wrong" ? make("span", { class: "label" }, "true: ", given(className(sample.label))) : null;
  const button = make(
    "button",
    { type: "button", class: "card", data: { sample: index }, on: { click: () => showSample(index) } },
    picture ? make("span", { class: "thumbnail" }, picture) : null,
    make("span", { class: "card-name", dir: "auto", title: sample.name }, given(sample.name), mark(outcome(sample))),
    snippet,
    make(
      "span",
      { class: "card-prediction" },
      given(className(sample.prediction)),
      make("span", { class: "number" }, percent(confidence(sample))),
    ),
    label,
  );
  return {
    item: make("li", {}, button),
    button,
    filled: false,
    async paint() {
      try {
        if (picture) await paintThumbnail(picture, sample, THUMBNAIL);
        else await paintSnippet(snippet, sample, SNIPPET);
      } catch (fault) {
        button.classList.add("faulty");
        button.title = sentence(fault);
      }
    },
    choose(chosen) {
      if (chosen) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    },
    reveal() {
      button.scrollIntoView({ block: "nearest", inline: "nearest" });
    },
  };
}

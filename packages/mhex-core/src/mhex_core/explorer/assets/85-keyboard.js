// Keys, and the dialog that lists them.

const KEYS = [
  [["\u2190", "\u2192", "j", "k"], "next (\u2192, j) or previous (\u2190, k) sample"],
  [["b", "B"], "more or less evidence against"],
  [["o", "O"], "map more or less opaque"],
  [["c"], "compare: a second view"],
  [["l"], "go to the layers"],
  [["/"], "search names"],
  [["?"], "these keys"],
  [["Esc"], "close what is open"],
];

/** The sample before or after the one of a pane, among those that pass the filters. */
function step(by, number = state.active) {
  const pane = state.panes[number];
  const wanted = explorer.gallery ? explorer.gallery.neighbour(pane.sample, by) : pane.sample + by;
  if (wanted === undefined || !page.samples[wanted]) return;
  showSample(wanted, number);
  explorer.gallery?.reveal(wanted);
  const sample = page.samples[wanted];
  announce(`${sample.name}, predicted ${className(sample.prediction)}, ${percent(confidence(sample))}`);
}

function changeOpacity(by) {
  state.opacity = rounded(Math.min(1, Math.max(0, state.opacity + by)));
  changed();
}

const ACTIONS = {
  ArrowRight: () => step(1),
  ArrowLeft: () => step(-1),
  j: () => step(1),
  k: () => step(-1),
  b: () => setBeta(settingsOf(state.panes[state.active]).beta + 0.05),
  B: () => setBeta(settingsOf(state.panes[state.active]).beta - 0.05),
  o: () => changeOpacity(0.1),
  O: () => changeOpacity(-0.1),
  c: toggleCompare,
  l: () => explorer.views[state.active].layers.focus(),
  "/": () => explorer.gallery?.search.focus(),
  "?": showHelp,
  Escape: hideTooltip,
};

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return;
    const typing = event.target.closest?.("input:not([type=range], [type=radio]), select, textarea");
    const arrows = event.key.startsWith("Arrow") && event.target.closest?.("input, select, summary");
    const action = Object.hasOwn(ACTIONS, event.key) ? ACTIONS[event.key] : null;
    if (!action || (typing && event.key !== "Escape") || arrows) return;
    if (event.key !== "Escape") event.preventDefault();
    action();
  });
}

function showHelp() {
  showDialog("Keys", [
    make(
      "dl",
      { class: "keys" },
      KEYS.flatMap(([keys, meaning]) => [
        make(
          "dt",
          {},
          keys.map((key) => make("kbd", {}, key)),
        ),
        make("dd", {}, meaning),
      ]),
    ),
    make(
      "p",
      { class: "hint" },
      page.kind === "images"
        ? "On the overlay the arrow keys move a cross that reads values; with Shift by 8 pixels."
        : "In a text the arrow keys go from word to word and tell what each layer adds.",
    ),
  ]);
}

/** How the explanations came to be, as far as the page knows. */
function showAbout() {
  const known = Object.entries(page.about);
  showDialog(
    "About this page",
    [
      known.length
        ? make(
            "dl",
            { class: "about" },
            known.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, given(value))]),
          )
        : null,
      make(
        "p",
        {},
        page.kind === "images"
          ? "Each map is the sum of the layers\u2019 evidence, weighed: \u03a3 \u03bb (for + \u03b2 against). The page adds it up itself; nothing is sent anywhere."
          : "Each score is the sum of the layers\u2019 evidence, weighed: \u03a3 \u03bb (for + \u03b2 against). The page adds it up itself; nothing is sent anywhere.",
      ),
    ].filter(Boolean),
  );
}

function showDialog(title, content) {
  const before = document.activeElement;
  const dialog = make(
    "dialog",
    { "aria-labelledby": "dialog-title" },
    make(
      "div",
      { class: "group-head" },
      make("h2", { id: "dialog-title" }, title),
      iconButton("close", "Close", () => dialog.close()),
    ),
    content,
  );
  dialog.addEventListener("close", () => {
    dialog.remove();
    before?.focus?.();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
}

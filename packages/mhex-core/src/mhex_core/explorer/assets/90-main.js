// The page as a whole: what is put where, and the beginning.

const explorer = { views: [], gallery: null, controls: null };

/** Light, dark, or as the system has it. */
const THEMES = ["auto", "light", "dark"];

function makeTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "auto";
  const apply = () => {
    document.documentElement.dataset.theme = chosen === "auto" ? (system.matches ? "dark" : "light") : chosen;
    changed();
  };
  const button = iconButton("theme", "Colours: as the system has them", () => {
    chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
    const name = `Colours: ${chosen === "auto" ? "as the system has them" : chosen}`;
    button.setAttribute("aria-label", name);
    button.title = name;
    apply();
  });
  system.addEventListener("change", apply);
  apply();
  return button;
}

function makeHeader() {
  const methods = page.methods.length > 1 ? `, ${counted(page.methods.length, "method")}` : "";
  const compare = make(
    "button",
    {
      type: "button",
      class: "compare-button",
      "aria-label": "Compare",
      "aria-pressed": "false",
      on: { click: toggleCompare },
    },
    icon("compare"),
    make("span", {}, "Compare"),
  );
  listeners.change.push(() => compare.setAttribute("aria-pressed", String(state.panes.length > 1)));
  return make(
    "header",
    {},
    make("h1", { dir: "auto" }, given(page.title)),
    make(
      "p",
      { class: "count" },
      `${counted(page.samples.length, page.kind === "images" ? "image" : "text")}${methods}`,
    ),
    make(
      "div",
      { class: "header-actions" },
      page.compact ? null : compare,
      makeTheme(),
      iconButton("about", "About this page", showAbout),
      iconButton("help", "Keys", showHelp),
    ),
  );
}

function build(root) {
  readAddress();
  const many = page.samples.length > 1;
  explorer.gallery = page.compact || !many ? null : makeGallery();
  explorer.controls = makeControls();
  explorer.views = [0, 1].slice(0, page.compact ? 1 : 2).map(makePaneView);
  const panes = make(
    "div",
    { class: "panes" },
    explorer.views.map((view) => view.element),
  );
  root.replaceChildren(
    makeHeader(),
    make(
      "main",
      { class: [page.kind, page.compact ? "compact" : "", explorer.gallery ? "" : "alone"].join(" ").trim() },
      explorer.gallery?.element ?? null,
      panes,
      explorer.controls.element,
    ),
    make("div", { id: "tooltip", role: "tooltip", hidden: true }),
    make("p", { id: "toast", hidden: true, "aria-hidden": "true" }),
    make("p", { id: "announcement", class: "unseen-text", role: "status" }),
  );
  listeners.change.push(() => panes.classList.toggle("two", state.panes.length > 1), explorer.controls.update);
  if (explorer.gallery) listeners.change.push(explorer.gallery.update);
}

let drawing = Promise.resolve();

function drawPanes() {
  drawing = Promise.all(explorer.views.map((view) => view.update()));
}

/** Resolves when everything asked for so far is drawn. */
async function settled() {
  do {
    await new Promise((resume) => setTimeout(resume));
    await drawing;
  } while (waiting !== null);
}

function showFault(root, message) {
  root.replaceChildren(
    make("h1", {}, page.title ?? "Explanations"),
    make("p", { class: "fault", role: "alert" }, message),
  );
}

async function start() {
  const root = document.getElementById("explorer");
  if (page.fault) return showFault(root, page.fault);
  if (typeof DecompressionStream === "undefined") {
    return showFault(
      root,
      "This browser cannot unpack the page; Chrome or Edge 103, Firefox 113 or Safari 16.4, or a later one, can.",
    );
  }
  if (!page.samples.length) return showFault(root, "This page holds no samples.");
  try {
    build(root);
  } catch (error) {
    console.error(error);
    return showFault(root, sentence(error));
  }
  listeners.change.push(drawPanes);
  listenToKeys();
  addEventListener("hashchange", () => {
    if (location.hash.slice(1) === addressOf()) return;
    readAddress();
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  changed();
  await settled();
  performance.mark("mhex-ready");
}

const ready = start();

// For tests alone: nothing here changes what is shown.
//   ready      resolves when the first view is drawn
//   settled()  resolves when all that was asked for is drawn
//   state()    a copy of what is shown: panes (sample, method, target, beta, weights), opacity, colours, threshold, unit
//   values(n)  the map of pane n (0 unless given) row by row, as Python gives it, or the scores of its tokens
//   pieces(n)  the scores of the words or tokens of a text, in their order
window.mhexExplorer = Object.freeze({
  ready,
  settled,
  state: () =>
    structuredClone({
      ...state,
      panes: state.panes.map((pane) => ({
        sample: pane.sample,
        method: pane.method,
        target: targetOf(pane),
        ...settingsOf(pane),
      })),
    }),
  values: (number = 0) => Array.from(explorer.views[number]?.current?.result.values ?? []),
  pieces: (number = 0) => Array.from(explorer.views[number]?.body.scores?.() ?? []),
});

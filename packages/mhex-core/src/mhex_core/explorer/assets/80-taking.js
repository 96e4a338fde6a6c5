// What a reader takes along: a picture, a line of Python, a link.

/** The picture with its map and outline, as it is shown, at least 512 pixels wide. */
async function savePicture() {
  const { current } = explorer.views[state.active];
  if (!current) return;
  const { pane, picture, result } = current;
  const method = methodOf(pane);
  const factor = Math.max(1, Math.ceil(512 / result.width));
  const canvas = make("canvas", { width: factor * result.width, height: factor * result.height });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = Math.max(picture.naturalWidth, picture.naturalHeight) >= CRISP;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const heat = make("canvas");
  paint(heat, result, method, { opacity: state.opacity });
  context.imageSmoothingEnabled = true;
  context.drawImage(heat, 0, 0, canvas.width, canvas.height);
  if (state.threshold) {
    context.scale(factor, factor);
    for (const [sign, dash] of method.signed
      ? [
          [1, []],
          [-1, [3, 2]],
        ]
      : [[1, []]]) {
      const line = new Path2D(
        contour(
          sign > 0 ? result.drawn : result.drawn.map((value) => -value),
          result.height,
          result.width,
          state.threshold,
        ),
      );
      for (const [colour, width] of [
        ["#000", 3.5],
        ["#fff", 1.75],
      ]) {
        Object.assign(context, { strokeStyle: colour, lineWidth: width / factor });
        context.setLineDash(dash.map((length) => (2 * length) / factor));
        context.stroke(line);
      }
    }
  }
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const address = URL.createObjectURL(blob);
  const name = `${sampleOf(pane).name}-${className(targetOf(pane))}`.replace(/[^\p{L}\p{N}._-]+/gu, "_");
  make("a", { href: address, download: `${name}.png` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
  say(`Saved ${name}.png`);
}

/** The call that gives the same map, or the same scores. */
function pythonLine(pane) {
  const { beta, weights } = settingsOf(pane);
  return `explanation.reweighted(beta=${rounded(beta)}, layer_weights=[${weights.map((weight) => +weight.toPrecision(12)).join(", ")}])`;
}

function copyPython() {
  copy(pythonLine(state.panes[state.active]), "Python line");
}

function copyLink() {
  copy(`${location.href.split("#")[0]}#${addressOf()}`, "Link");
}

/** Put a text in the clipboard; where that is forbidden, show it so that it can be copied by hand. */
async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${what} copied`);
  } catch {
    const field = make("textarea", { readonly: true, rows: 3, "aria-label": what }, text);
    showDialog(what, [make("p", {}, "Copy this text:"), field]);
    field.select();
  }
}

let sayTimer = null;

/** Say what was done, to eyes and to screen readers, for a while. */
function say(text) {
  const toast = document.getElementById("toast");
  toast.textContent = text;
  toast.hidden = false;
  announce(text);
  clearTimeout(sayTimer);
  sayTimer = setTimeout(() => {
    toast.hidden = true;
  }, 2400);
}

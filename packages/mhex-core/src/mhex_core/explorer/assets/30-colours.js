// Colour maps, and what is laid over a picture.
//
// A value v in [0, 1] has the colour of place floor(256 v) of 256, a signed one that of (v + 1) / 2. Over the picture it is
// as opaque as it is strong, so that what is nothing hides nothing.

const SEQUENTIAL = { inferno: "Inferno", viridis: "Viridis", cividis: "Cividis", magma: "Magma", grey: "Grey" };

const GREY = Uint8Array.from({ length: 768 }, (_, index) => Math.floor(index / 3));
const colourTables = new Map();

/** 256 colours, three bytes each. */
function colourTable(name) {
  if (name === "grey") return GREY;
  if (!colourTables.has(name)) {
    const bytes = atob(COLOUR_TABLES[name]);
    colourTables.set(
      name,
      Uint8Array.from(bytes, (character) => character.charCodeAt(0)),
    );
  }
  return colourTables.get(name);
}

/** The colour map that a method's map is drawn in. */
function tableFor(method) {
  return colourTable(method.signed ? "diverging" : state.colours);
}

function colourPlace(value, signed) {
  const place = Math.floor(256 * (signed ? (value + 1) / 2 : value));
  return 3 * Math.min(255, Math.max(0, place));
}

/** The pixels of a map: opaque, or as opaque as each value is strong times `opacity`. */
function painted(map, method, { opacity = null } = {}) {
  const table = tableFor(method);
  const image = new ImageData(map.width, map.height);
  const pixels = image.data;
  for (let index = 0; index < map.drawn.length; index += 1) {
    const value = map.drawn[index];
    const place = colourPlace(value, method.signed);
    pixels[4 * index] = table[place];
    pixels[4 * index + 1] = table[place + 1];
    pixels[4 * index + 2] = table[place + 2];
    pixels[4 * index + 3] = opacity === null ? 255 : Math.round(255 * opacity * Math.min(1, Math.abs(value)));
  }
  return image;
}

/** Draw a map on a canvas, which takes the map's size. */
function paint(canvas, map, method, options) {
  if (canvas.width !== map.width) canvas.width = map.width;
  if (canvas.height !== map.height) canvas.height = map.height;
  canvas.getContext("2d").putImageData(painted(map, method, options), 0, 0);
}

/** The colours from the least to the most, one pixel each. */
function paintScale(canvas, method) {
  const drawn = Float64Array.from({ length: 256 }, (_, index) => (index + 0.5) / 256);
  const values = method.signed ? drawn.map((value) => 2 * value - 1) : drawn;
  paint(canvas, { drawn: values, width: 256, height: 1 }, method);
}

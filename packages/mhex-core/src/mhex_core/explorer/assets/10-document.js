// The document and the blocks: what stands in the page, unpacked when it is first shown and not before.
//
// Letters: L layers, h x w layer size, T tokens. Evidence once unpacked is
// { positive, negative: L Float64Arrays, shapes: L arrays, steps: L pairs, largest: L pairs }.

const KEPT = 48; // samples whose evidence stays unpacked

/** A fault that is told to the reader in these very words. */
class Told extends Error {}

const page = readDocument();
const unpackedSamples = new Map();

function readDocument() {
  const element = document.getElementById("document");
  let found = null;
  try {
    found = JSON.parse(element.textContent);
  } catch {
    return { fault: "This file is damaged or incomplete: its description cannot be read." };
  }
  if (found?.format !== "mhex-explorer" || found.version !== 1 || !Array.isArray(found.samples)) {
    return { fault: "This file is not an explorer page of version 1." };
  }
  return found;
}

/** The name of a class, "class 3" where names are not known. */
function className(index) {
  return page.class_names[index] ?? `class ${index}`;
}

/** Names of layers without what all of them begin with, but for its last part: "layer.3" of "encoder.layer.3". */
function shortNames(names) {
  const parts = names.map((name) => name.split("."));
  let same = 0;
  while (parts.every((one) => one.length > same + 1 && one[same] === parts[0][same])) same += 1;
  return parts.map((one) => one.slice(Math.max(0, same - 1)).join("."));
}

/** Whether a prediction is "right" or "wrong", or "unknown" where there is no label. */
function outcome(sample) {
  if (sample.label === null) return "unknown";
  return sample.label === sample.prediction ? "right" : "wrong";
}

/** The probability of a class, null where the page does not keep it. */
function probability(sample, index) {
  const found = sample.probabilities.find(([one]) => one === index);
  return found ? found[1] : null;
}

/** Places in a sample's evidence of those that are by a method. */
function evidenceOf(sample, method) {
  return sample.evidence.flatMap((one, place) => (one.method === method ? [place] : []));
}

function blockLines(sample) {
  const element = document.getElementById(`block-${sample.block}`);
  const lines = element ? element.textContent.trim().split("\n") : [];
  const expected = sample.evidence.length + (page.kind === "images" ? 1 : 0);
  if (lines.length !== expected) throw new Told("What belongs to this sample is missing: the file is damaged.");
  return lines;
}

/** What was unpacked of a sample; the least recently used samples are forgotten. */
function slot(sample) {
  let found = unpackedSamples.get(sample.block);
  if (found) unpackedSamples.delete(sample.block);
  else found = { picture: null, evidence: new Map() };
  unpackedSamples.set(sample.block, found);
  if (unpackedSamples.size > KEPT) unpackedSamples.delete(unpackedSamples.keys().next().value);
  return found;
}

/** The picture of a sample, as an image element that is ready to be drawn. */
function pictureOf(sample) {
  const kept = slot(sample);
  kept.picture ??= loadPicture(blockLinesOrReject(sample));
  return kept.picture;
}

/** The evidence at a place of a sample. */
function unpackedEvidence(sample, place) {
  const kept = slot(sample).evidence;
  if (!kept.has(place)) kept.set(place, unpack(sample, place));
  return kept.get(place);
}

function blockLinesOrReject(sample) {
  try {
    return Promise.resolve(blockLines(sample));
  } catch (fault) {
    return Promise.reject(fault);
  }
}

async function loadPicture(lines) {
  const image = new Image();
  image.src = (await lines)[0];
  try {
    await image.decode();
  } catch {
    throw new Told("The picture of this sample cannot be read: the file is damaged.");
  }
  return image;
}

async function unpack(sample, place) {
  const lines = await blockLinesOrReject(sample);
  const line = lines[place + (page.kind === "images" ? 1 : 0)];
  try {
    return evidenceFrom(await inflated(line), sample.evidence[place].shapes);
  } catch {
    throw new Told("The evidence of this sample cannot be read: the file is damaged.");
  }
}

async function inflated(base64) {
  const packed = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/**
 * Numbers out of bytes: low and step of each of 2 L parts, then high bytes, then low bytes of all values' levels, each
 * as its difference from the one before.
 */
function evidenceFrom(buffer, shapes) {
  const sizes = shapes.map((shape) => shape.reduce((product, side) => product * side, 1));
  const count = 2 * sizes.reduce((sum, size) => sum + size, 0);
  const start = 16 * shapes.length;
  if (buffer.byteLength !== start + 2 * count) throw new RangeError("another number of values");
  const heads = new DataView(buffer, 0, start);
  const bytes = new Uint8Array(buffer, start);
  let position = 0;
  const parts = [...sizes, ...sizes].map((size, part) => {
    const low = heads.getFloat32(8 * part, true);
    const step = heads.getFloat32(8 * part + 4, true);
    const values = new Float64Array(size);
    let level = 0;
    for (let index = 0; index < size; index += 1, position += 1) {
      level = (level + 256 * bytes[position] + bytes[count + position]) & 65535;
      values[index] = low + step * level;
    }
    return { values, step, largest: values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) };
  });
  const layers = shapes.map((_, layer) => [parts[layer], parts[layer + shapes.length]]);
  return {
    positive: layers.map(([plus]) => plus.values),
    negative: layers.map(([, minus]) => minus.values),
    shapes,
    steps: layers.map((pair) => pair.map((part) => part.step)),
    largest: layers.map((pair) => pair.map((part) => part.largest)),
  };
}

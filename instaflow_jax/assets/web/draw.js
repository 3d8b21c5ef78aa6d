// Draws in the browser: CLIP's tokenizer, the noise of jax.random, and the one-step program in ONNX Runtime Web.
// Every file comes from the folder of the page.

// ---------------------------------------------------------------- tokenizer

const WORD = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const WORD_END = "</w>";
const LETTERS = letterOfEachByte();

// The letter that stands for each byte in the vocabulary: itself if it can be seen, else one from 256 on.
function letterOfEachByte() {
  let invisible = 256;
  const seen = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(seen(byte) ? byte : invisible++));
}

// As the library `tokenizers` normalizes: letter by letter, so that a final sigma stays a sigma.
function normalize(text) {
  const composed = text.normalize("NFC").replace(/\p{White_Space}+/gu, " ");
  return Array.from(composed, (letter) => letter.toLowerCase()).join("");
}

// Cuts a text into the ids of the added tokens in it and the texts between them.
function makeCut(tokens) {
  const ids = new Map(tokens);
  if (!ids.size) return (text) => [text];
  const longestFirst = [...ids.keys()].sort((a, b) => b.length - a.length);
  const pattern = longestFirst.map((token) => token.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&")).join("|");
  const separator = new RegExp(`(${pattern})`, "u");
  return (text) => text.split(separator).filter(Boolean).map((part) => ids.get(part) ?? part);
}

// tokenizer.json → a function of a prompt: the row of ids that the text encoder takes, the number of the prompt's own
// tokens, and how many of them fit.
export function makeTokenizer(file) {
  const { vocab, merges, unk_token } = file.model;
  const ids = new Map(Object.entries(vocab));
  const joins = new Map(); // "id id" → the place of their merge in the list and the id of the joined token
  merges.forEach((merge, rank) => {
    const [first, second] = typeof merge === "string" ? merge.split(" ") : merge;
    joins.set(`${ids.get(first)} ${ids.get(second)}`, { rank, id: ids.get(first + second) });
  });
  const added = (normalized) => file.added_tokens.filter((token) => token.normalized === normalized);
  const cutRaw = makeCut(added(false).map(({ content, id }) => [content, id]));
  const cutNormal = makeCut(added(true).map(({ content, id }) => [normalize(content), id]));
  const { single, special_tokens } = file.post_processor;
  const [start, end] = single.flatMap((part) => (part.SpecialToken ? special_tokens[part.SpecialToken.id].ids : []));
  const room = file.truncation.max_length - 2;

  function encodeWord(word) {
    const letters = Array.from(new TextEncoder().encode(word), (byte) => LETTERS[byte]);
    letters[letters.length - 1] += WORD_END;
    const tokens = letters.map((letter) => ids.get(letter) ?? ids.get(unk_token));
    for (;;) {
      let best = null;
      for (let i = 0; i + 1 < tokens.length; i++) {
        const join = joins.get(`${tokens[i]} ${tokens[i + 1]}`);
        if (join && !(best?.rank <= join.rank)) best = { ...join, i };
      }
      if (!best) return tokens;
      tokens.splice(best.i, 2, best.id);
    }
  }

  const each = (parts, encode) => parts.flatMap((part) => (typeof part === "string" ? encode(part) : [part]));
  const encodeWords = (text) => (text.match(WORD) ?? []).flatMap(encodeWord);
  return (prompt) => {
    const tokens = each(cutRaw(prompt), (text) => each(cutNormal(normalize(text)), encodeWords));
    const row = new Int32Array(file.truncation.max_length).fill(file.padding.pad_id);
    row.set([start, ...tokens.slice(0, room), end]);
    return { row, count: tokens.length, room };
  };
}

// ---------------------------------------------------------------- noise

const ROTATIONS = [[13, 15, 26, 6], [17, 29, 16, 24]];
const CENTRE = [2.81022636e-8, 3.43273939e-7, -3.5233877e-6, -4.39150654e-6, 0.00021858087, -0.00125372503];
CENTRE.push(-0.00417768164, 0.246640727, 1.50140941);
const TAIL = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613];
TAIL.push(0.00943887047, 1.00167406, 2.83297682);

// Threefry-2x32 of 20 rounds (Salmon et al., 2011), the two words of its output combined as jax.random does.
function threefry(key, a, b) {
  const keys = [...key, (key[0] ^ key[1] ^ 0x1bd11bda) >>> 0];
  a = (a + keys[0]) >>> 0;
  b = (b + keys[1]) >>> 0;
  for (let i = 0; i < 5; i++) {
    for (const bits of ROTATIONS[i % 2]) {
      a = (a + b) >>> 0;
      b = (((b << bits) | (b >>> (32 - bits))) ^ a) >>> 0;
    }
    a = (a + keys[(i + 1) % 3]) >>> 0;
    b = (b + keys[(i + 2) % 3] + i + 1) >>> 0;
  }
  return (a ^ b) >>> 0;
}

// The inverse error function by Giles's two polynomials, which XLA uses for float32.
function inverseErf(x) {
  const w = -Math.log1p(-x * x);
  const [coefficients, z] = w < 5 ? [CENTRE, w - 2.5] : [TAIL, Math.sqrt(w) - 3];
  return x * coefficients.reduce((sum, coefficient) => sum * z + coefficient, 0);
}

// jax.random.normal(jax.random.key(seed), [count]): the noise that instaflow_jax gives the seed, to float32's rounding.
export function noise(seed, count) {
  const least = Math.fround(-1 + 2 ** -24);
  return Float32Array.from({ length: count }, (_, i) => {
    const unit = (threefry([0, seed], 0, i) >>> 9) / 2 ** 23;
    const uniform = Math.max(least, Math.fround(2 * unit + least));
    return Math.SQRT2 * inverseErf(uniform);
  });
}

// ---------------------------------------------------------------- model

async function fetchFile(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  return response;
}

// A file as bytes; `onBytes` is told the length of each piece.
async function fetchBytes(name, onBytes) {
  const pieces = [];
  for (const reader = (await fetchFile(name)).body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(pieces).arrayBuffer());
    pieces.push(value);
    onBytes(value.length);
  }
}

// The backends to try in this order; `?backend=wasm` or `?backend=webgpu` in the page's address chooses one.
async function backendsToTry(known) {
  const chosen = new URLSearchParams(location.search).get("backend");
  if (known[chosen]) return [chosen];
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? ["webgpu", "wasm"] : ["wasm"];
}

// Loads the program; returns its name and `run(row, noise)` → ImageData.
async function loadModel(settings, onProgress) {
  const backends = await backendsToTry(settings.backends);
  const { program, bytes } = settings;
  let [loaded, total] = [0, bytes[program]];
  const count = (length) => onProgress((loaded += length), total);
  const runtimes = backends.map((name) => settings.backends[name]);
  total += bytes[runtimes[0].binary];
  const graph = await fetchBytes(program, count);
  for (const [i, backend] of backends.entries()) {
    try {
      const ort = await import(`./${runtimes[i].module}`);
      ort.env.wasm.wasmBinary = await fetchBytes(runtimes[i].binary, count);
      const options = { executionProviders: [backend], logSeverityLevel: 3 }; // errors only
      const session = await ort.InferenceSession.create(graph, options);
      const run = makeRun(ort, session, settings.noise);
      await run(new Int32Array(session.inputMetadata[0].shape[1]), new Float32Array(settings.noise.reduce((a, b) => a * b)));
      return { name: describe(backend, ort), run };
    } catch (error) {
      if (i + 1 === backends.length) throw error;
      console.warn(`${backend} does not run the model, ${backends[i + 1]} is tried`, error);
      total = loaded + bytes[runtimes[i + 1].binary];
    }
  }
}

function describe(backend, ort) {
  if (backend === "webgpu") return "WebGPU";
  const threads = ort.env.wasm.numThreads || 1;
  return `WASM, ${threads} thread${threads > 1 ? "s" : ""}`;
}

function makeRun(ort, session, shape) {
  return async (row, noise) => {
    const ids = new ort.Tensor("int32", row, [1, row.length]);
    const { images } = await session.run({ ids, noise: new ort.Tensor("float32", noise, [1, ...shape]) });
    const [, height, width] = images.dims;
    const rgb = await images.getData();
    const image = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) image.data.set([rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 255], 4 * i);
    return image;
  };
}

// ---------------------------------------------------------------- page

const SEEDS = 2 ** 32;
const SMALL = 256; // images with fewer pixels a side are enlarged without smoothing
const at = (id) => document.getElementById(id);

function report(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

function checkRequest(prompt, seed, encode) {
  if (!prompt) throw new Error("the prompt is empty; write what to draw");
  if (!(Number.isInteger(seed) && seed >= 0 && seed < SEEDS)) {
    throw new Error(`the seed must be an integer from 0 to ${SEEDS - 1}`);
  }
  const { row, count, room } = encode(prompt);
  if (count > room) throw new Error(`the prompt has ${count} tokens; use at most ${room}`);
  return row;
}

function show(image, prompt, seed, heading) {
  const canvas = at("image");
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.classList.toggle("small", image.height < SMALL);
  canvas.setAttribute("aria-label", prompt);
  at("heading").textContent = heading;
  at("caption").textContent = `${prompt}, seed ${seed}`;
  at("result").hidden = false;
}

async function draw({ encode, run, name, shape }) {
  const [prompt, seed] = [at("prompt").value.trim(), at("seed").valueAsNumber];
  const buttons = [at("draw"), at("another")];
  try {
    const row = checkRequest(prompt, seed, encode);
    buttons.forEach((button) => (button.disabled = true));
    report("Drawing.");
    await new Promise((painted) => setTimeout(painted, 20)); // WASM keeps the page from painting while it computes
    const start = performance.now();
    const image = await run(row, noise(seed, shape.reduce((a, b) => a * b)));
    const seconds = (performance.now() - start) / 1000;
    show(image, prompt, seed, `one step · ${seconds.toFixed(3)} s`);
    report(`Ready (${name}).`);
  } catch (error) {
    report(error.message, true);
  }
  buttons.forEach((button) => (button.disabled = false));
}

function connect(model, examples) {
  const request = () => draw(model);
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    request();
  });
  at("another").addEventListener("click", () => {
    at("seed").value = Math.floor(Math.random() * 2 ** 31);
    request();
  });
  for (const example of examples) {
    const button = document.createElement("button");
    button.textContent = example;
    button.addEventListener("click", () => {
      at("prompt").value = example;
      request();
    });
    at("examples").append(button);
  }
}

async function start() {
  const settings = JSON.parse(at("settings").textContent);
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  const onProgress = (loaded, total) => {
    at("progress").value = loaded / total;
    const whole = loaded >= total;
    report(whole ? "Starting the model." : `Loading: ${megabytes(loaded)} of ${megabytes(total)} MB.`);
  };
  try {
    const encode = makeTokenizer(await (await fetchFile(settings.tokenizer)).json());
    const model = { encode, shape: settings.noise, ...(await loadModel(settings, onProgress)) };
    connect(model, settings.examples);
    report(`Ready (${model.name}).`);
    for (const id of ["draw", "another"]) at(id).disabled = false;
    return model;
  } catch (error) {
    report(`The model does not run here: ${error.message}`, true);
    throw error;
  } finally {
    at("progress").hidden = true;
  }
}

export const ready = start();

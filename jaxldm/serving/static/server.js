// What the page says to the server that it came from, and what it hears.

export const TOKEN = "jaxldm.token";
const LARGEST = 700_000; // characters of a picture to start from: a request has at most 1 MiB

export class Problem extends Error {
  constructor(message, facts = {}) {
    super(message);
    Object.assign(this, facts);
  }
}

export async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    error = { message: `The server answered with status ${response.status}` }; // of a proxy, perhaps
  }
  const wait = response.headers.get("Retry-After");
  return new Problem(sayOf(error) + (wait ? ` Try again in ${wait} s.` : ""), {
    status: response.status,
    param: error.param,
  });
}

// A sentence, with the label of a field in place of its name in the API.
export function sayOf({ message = "", param }) {
  const label = param && document.querySelector(`label[for="${CSS.escape(param)}"]`);
  const text = label ? message.replace(param, label.textContent) : message;
  return text && text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const name = block.match(/^event: (.*)$/m);
      const data = block.match(/^data: (.*)$/m);
      if (name && data) yield [name[1], JSON.parse(data[1])];
    }
  }
}

// The centre of a picture at the size that is drawn, as the server would cut it: a photograph is larger than a
// request may be.
export function encoded(image, height, width) {
  const scale = Math.max(width / image.naturalWidth, height / image.naturalHeight);
  const [across, down] = [image.naturalWidth * scale, image.naturalHeight * scale];
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, (width - across) / 2, (height - down) / 2, across, down);
  const whole = canvas.toDataURL("image/png");
  return whole.length <= LARGEST ? whole : canvas.toDataURL("image/jpeg", 0.9);
}

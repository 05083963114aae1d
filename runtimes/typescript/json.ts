/** JSON as a bundle may hold it: no key twice in one object, nested at most 64 deep. Throws SyntaxError. */

const DEEPEST = 64;
const TOKEN = /"(?:[^"\\]|\\.)*"|[{}[\]:,]/g;

/** The value of `bytes`, which must be UTF-8. JSON.parse refuses NaN and infinities by itself. */
export function parseJson(bytes: Uint8Array): unknown {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new SyntaxError("it is not UTF-8");
  }
  const value: unknown = JSON.parse(text);
  checkKeysAndDepth(text);
  return value;
}

/** `text` is known to be JSON, so that a string before a colon is a key. */
function checkKeysAndDepth(text: string): void {
  const open: Set<string>[] = [];
  let lastString = "";
  for (const [token] of text.matchAll(TOKEN)) {
    if (token === "{" || token === "[") {
      open.push(new Set());
      if (open.length > DEEPEST) throw new SyntaxError(`it is nested more than ${DEEPEST} deep`);
    } else if (token === "}" || token === "]") {
      open.pop();
    } else if (token === ":") {
      const key = JSON.parse(lastString) as string;
      const keys = open.at(-1);
      if (keys?.has(key)) throw new SyntaxError(`key '${key}' stands twice`);
      keys?.add(key);
    } else if (token !== ",") {
      lastString = token;
    }
  }
}

/** SHA-256 by WebCrypto, which browsers and Node have alike. */

import { NotAvailableError } from "./errors.js";

export async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  const subtle = globalThis.crypto?.subtle as SubtleCrypto | undefined;
  if (!subtle) {
    throw new NotAvailableError(
      "the bundle cannot be checked: a page has WebCrypto over https and on localhost only; serve it that way",
    );
  }
  const digest = new Uint8Array(await subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

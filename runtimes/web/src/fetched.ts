/** A bundle on a web server. */

import type { Source } from "./core/bundle.js";
import { NotAvailableError, oneLine } from "./core/errors.js";

/** The files under an absolute URL, by name: a folder on a web server cannot be listed. */
export function fetchedSource(url: string): Source {
  const base = new URL(url.endsWith("/") ? url : `${url}/`);
  return {
    name: decodeURIComponent(base.pathname.split("/").at(-2) || base.host),
    async read(path) {
      const place = new URL(path.split("/").map(encodeURIComponent).join("/"), base);
      let response: Response;
      try {
        response = await fetch(place);
      } catch (error) {
        throw new NotAvailableError(`${place} cannot be fetched: ${oneLine(error)}; is its server there?`);
      }
      if (response.status === 404 || response.status === 410) return null;
      if (!response.ok) throw new NotAvailableError(`${place} cannot be fetched: status ${response.status}`);
      return new Uint8Array(await response.arrayBuffer());
    },
  };
}

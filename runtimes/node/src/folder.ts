/** A bundle in a folder. */

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { lstat, readdir, readFile } from "node:fs/promises";
import { basename, join, relative, resolve, sep } from "node:path";

import type { Source } from "./core/bundle.js";

const LARGEST = 2 ** 31 - 1; // bytes that readFile reads

/**
 * The files of a folder; nothing is opened that the bundle's checks have not asked for, and no link is followed. Of a
 * file above `largest` bytes the hash is taken piece by piece, and ONNX Runtime reads it by itself.
 */
export function folderSource(folder: string, largest = LARGEST): Source {
  const root = resolve(folder);
  const placeOf = (path: string) => join(root, ...path.split("/"));
  return {
    name: basename(root),
    place: placeOf,
    async read(path) {
      const place = placeOf(path);
      try {
        const found = await lstat(place);
        if (!found.isFile()) return null;
        if (found.size > largest) return { size: found.size, sha256: await hashOf(place) };
        return Uint8Array.from(await readFile(place));
      } catch (error) {
        if (isMissing(error)) return null;
        throw error;
      }
    },
    async list() {
      try {
        const entries = await readdir(root, { recursive: true, withFileTypes: true });
        return entries.filter((entry) => !entry.isDirectory()).map((entry) => ({
          path: relative(root, join(entry.parentPath, entry.name)).split(sep).join("/"),
          kind: entry.isSymbolicLink() ? "link" as const : entry.isFile() ? "file" as const : "other" as const,
        }));
      } catch (error) {
        if (isMissing(error)) return [];
        throw error;
      }
    },
  };
}

async function hashOf(place: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const part of createReadStream(place)) hash.update(part as Buffer);
  return hash.digest("hex");
}

function isMissing(error: unknown): boolean {
  const code = (error as NodeJS.ErrnoException).code;
  return code === "ENOENT" || code === "ENOTDIR";
}

/** A bundle in a folder. */

import { lstat, readdir, readFile } from "node:fs/promises";
import { basename, join, relative, resolve, sep } from "node:path";

import type { Source } from "./core/bundle.js";

/** The files of a folder; nothing is opened that the bundle's checks have not asked for, and no link is followed. */
export function folderSource(folder: string): Source {
  const root = resolve(folder);
  return {
    name: basename(root),
    async read(path) {
      const place = join(root, ...path.split("/"));
      try {
        if (!(await lstat(place)).isFile()) return null;
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

function isMissing(error: unknown): boolean {
  const code = (error as NodeJS.ErrnoException).code;
  return code === "ENOENT" || code === "ENOTDIR";
}

/** Errors of one line: what is wrong, where, both values, the next move. `exitCode` is that of a command line. */

export class KitError extends Error {
  readonly exitCode: number = 1;
  override name = "KitError";
}

/** A wrong argument, or a folder that is no bundle. */
export class UsageError extends KitError {
  override readonly exitCode = 2;
  override name = "UsageError";
}

/** Not possible on this machine, in this browser, or with this bundle. */
export class NotAvailableError extends KitError {
  override readonly exitCode = 3;
  override name = "NotAvailableError";
}

/** The bundle is damaged or cannot be trusted. */
export class BundleError extends KitError {
  override readonly exitCode = 5;
  override name = "BundleError";
}

/** The error that travelled as its name and message, for instance out of a worker. */
export function revived(name: string, message: string): Error {
  const known = [KitError, UsageError, NotAvailableError, BundleError].find((kind) => new kind("").name === name);
  return known ? new known(message) : new Error(message);
}

/** The message of a foreign library in one line of at most 300 characters. */
export function oneLine(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.split(/\s+/).filter(Boolean).join(" ").slice(0, 300) || "no message";
}

/** Reading an object of unknown JSON field by field, with the place of what is wrong in the message. */

import { BundleError } from "./errors.js";

export class Fields {
  private readonly fields: Readonly<Record<string, unknown>>;

  /** `where` is the file; `place` the path to this object inside it, with a dot at the end. */
  constructor(value: unknown, private readonly where: string, private readonly place = "") {
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      throw new BundleError(`${where} is not valid: ${place.slice(0, -1) || "it"}: is no object; rebuild the bundle`);
    }
    this.fields = value as Record<string, unknown>;
  }

  /** The error that says what is wrong with a field. */
  invalid(name: string, problem: string): BundleError {
    return new BundleError(`${this.where} is not valid: ${this.place}${name}: ${problem}; rebuild the bundle`);
  }

  text(name: string): string {
    const value = this.fields[name];
    if (typeof value !== "string") throw this.invalid(name, `${shown(value)} is no text`);
    return value;
  }

  optionalText(name: string): string | undefined {
    return this.fields[name] === undefined ? undefined : this.text(name);
  }

  number(name: string, least = -Infinity): number {
    const value = this.fields[name];
    if (typeof value !== "number" || !Number.isFinite(value)) throw this.invalid(name, `${shown(value)} is no number`);
    if (value < least) throw this.invalid(name, `is ${value}, at least ${least}`);
    return value;
  }

  whole(name: string, least: number): number {
    const value = this.number(name, least);
    if (!Number.isInteger(value)) throw this.invalid(name, `${value} is no whole number`);
    return value;
  }

  hash(name: string): string {
    const value = this.text(name);
    if (!/^[0-9a-f]{64}$/.test(value)) throw this.invalid(name, `${shown(value)} is no SHA-256`);
    return value;
  }

  isNull(name: string): boolean {
    return this.fields[name] === null || this.fields[name] === undefined;
  }

  isFalse(name: string): boolean {
    return this.fields[name] === false;
  }

  child(name: string): Fields {
    return new Fields(this.fields[name], this.where, `${this.place}${name}.`);
  }

  list<T>(name: string, item: (fields: Fields) => T): T[] {
    return this.array(name).map((value, i) => item(new Fields(value, this.where, `${this.place}${name}.${i}.`)));
  }

  /** A list of numbers and words. */
  values(name: string, fits: (value: number | string) => boolean): (number | string)[] {
    return this.array(name).map((value) => {
      const simple = typeof value === "number" || typeof value === "string";
      if (!simple || !fits(value)) throw this.invalid(name, `holds ${shown(value)}`);
      return value;
    });
  }

  private array(name: string): unknown[] {
    const value = this.fields[name];
    if (!Array.isArray(value)) throw this.invalid(name, `${shown(value)} is no list`);
    return value;
  }
}

function shown(value: unknown): string {
  return value === undefined ? "nothing" : JSON.stringify(value).slice(0, 80);
}

/** Asks again and again while the page is seen and not paused: one round at a time, slower while it fails. */

const EVERY_MS = 2000;
const SLOWEST = 16;

/** `round(whole)` reads the server: all of it when asked to by `now`, and every third time. */
export class Polling {
  constructor(round) {
    Object.assign(this, { round, n: 0, slowness: 1, timer: null, reading: null, stopped: false });
    document.addEventListener("visibilitychange", () => document.hidden || this.stopped || this.now());
  }

  /** Read everything, as soon as a round that is under way has ended. */
  async now() {
    clearTimeout(this.timer);
    await this.reading;
    await this.turn(true);
  }

  /** No more rounds but those that `now` asks for, until `resume`. */
  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
  }

  resume() {
    this.stopped = false;
    return this.now();
  }

  async turn(whole) {
    clearTimeout(this.timer);
    if (this.reading) return this.reading;
    this.reading = this.round(whole || this.n++ % 3 === 0);
    this.slowness = (await this.reading) ? 1 : Math.min(SLOWEST, this.slowness * 2);
    this.reading = null;
    if (!this.stopped && !document.hidden) this.timer = setTimeout(() => this.turn(false), EVERY_MS * this.slowness);
  }
}

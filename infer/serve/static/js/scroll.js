/** Keeps the end of a growing text in view, unless the reader has scrolled away from it. */
export class Follower {
  constructor(scroller, button) {
    Object.assign(this, { scroller, button, following: true, last: 0 });
    scroller.addEventListener("scroll", () => this.look(), { passive: true });
    button.addEventListener("click", () => {
      this.jump();
      scroller.focus({ preventScroll: true }); // the button disappears
    });
    new ResizeObserver(() => this.follow()).observe(scroller);
  }

  look() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const atEnd = scrollHeight - scrollTop - clientHeight < 8;
    this.following = atEnd || (this.following && scrollTop >= this.last);
    this.last = scrollTop;
    this.button.hidden = this.following;
  }

  follow() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.look();
  }

  jump() {
    this.following = true;
    this.follow();
    this.button.hidden = true;
  }
}

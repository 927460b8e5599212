/* The engines that the sentry watches. */
#ifndef AU_WATCHED_H
#define AU_WATCHED_H

#include <stdbool.h>
#include <stdint.h>

struct au_engine;

/* The descriptor of an epoll that becomes readable with a message of any engine, or with
 * `kick_fd`, whose events carry NULL instead of an engine.  Or -errno. */
int au_watched_open(int kick_fd);
void au_watched_close(void);

int au_sentry_add(struct au_engine *engine);
void au_sentry_remove(struct au_engine *engine);
/* A reference to `engine` if it still lives; pointers from epoll and slots may be stale. */
bool au_watched_hold(struct au_engine *engine);
/* Call `look` with each engine. */
void au_watched_each(void (*look)(struct au_engine *engine, void *argument), void *argument);
/* In a forked child: none, and the engines are the parent's. */
void au_watched_forked(void);

#endif

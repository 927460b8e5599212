/* The life of an engine, which the sentry watches. */
#ifndef AU_LIFECYCLE_H
#define AU_LIFECYCLE_H

#include "engine.h"

/* Engine for descriptor `fd`, which stays the caller's to close after au_engine_close. */
struct au_engine *au_engine_create(int fd, int options, int *error);
void au_engine_close(struct au_engine *engine);
void au_engine_free(struct au_engine *engine);

#endif

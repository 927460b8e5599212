/* A forked child's side of AU_REGION_SERVE (children.h).
 *
 * A pthread_atfork handler makes the child a userfaultfd of its own before anything else runs in it,
 * registers the regions that were left to it, and sends a copy of the descriptor to
 * their server.  That takes no privilege, unlike UFFD_FEATURE_EVENT_FORK, and nobody waits: fork()
 * returns at once on both sides.  A page that is missing then waits in the kernel until
 * the server fills it.
 *
 * It must never be left alone with that, for the last close of a userfaultfd turns what is
 * missing into zeros.  So the child keeps a copy, in a table of descriptors of its own that only
 * one thread has: the closing of all descriptors, a favourite of daemons, does not reach it,
 * and nothing else is kept open by it.  That thread sleeps until the server has let go of the child
 * or has died.  From then on it is the one that answers, and every answer is an error.
 *
 * If a step fails the regions are made inaccessible: SIGSEGV, not zeros.  Children made by a bare
 * clone(2) run no handlers and are not covered; those of vfork have their parent's memory.
 */
#ifndef AU_INHERIT_H
#define AU_INHERIT_H

/* In the child, in the handler; with the lock of children.h, which it releases. */
void au_inherit(void);

#endif

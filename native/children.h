/* Memory that fork leaves to children of this process, and the children that come to be served.
 *
 * The kernel leaves a forked child's copy of a registered mapping unregistered: what is missing
 * would read as zeros there.  With AU_REGION_SERVE the child hands it over to us instead, with
 * a userfaultfd of its own, as the first thing it does (inherit.h).
 *
 * A process that made such a region is its *server*, for its children, and for theirs.  There is
 * one socket per server, made with its first region; the ends for children are inherited.
 */
#ifndef AU_CHILDREN_H
#define AU_CHILDREN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct au_region;

/* A child that has come.  Its descriptors are given back by au_children_release and not closed, for
 * children that are forked in between must not keep copies of them. */
struct au_child {
	int uffd;
	/* `regions` of struct au_child_region can be read from it, and then its end; addresses of pages
	 * that are sent become errors. */
	int socket;
	int32_t pid; /* as the child sees it: for messages */
	uint32_t regions;
};

/* What a child says of each region. */
struct au_child_region {
	uint64_t serial;
	uint64_t start;
	uint64_t length;
	uint64_t page_size;
};

/* Descriptor that is readable when children have come; -EBADF before the first region. */
int au_children_fd(void);
/* The next child: 1; 0 if there is none; -errno if it could not be received (-EMFILE, ...), and
 * so gives errors to its own touches. */
int au_children_receive(struct au_child *child);
/* Serve a child no more.  What it touches from now on is an error, unless it is there. */
void au_children_release(int uffd, int socket);

/* ---------------------------------------------------------- for region.c */

/* Leave `region` to children from now on.  0 or -errno. */
int au_children_add(struct au_region *region);
/* It was closed: children get what is there, and errors for the rest. */
void au_children_closed(struct au_region *region);
/* Its memory goes. */
void au_children_remove(struct au_region *region);

/* --------------------------------------------------------- for inherit.c */

/* Generations of processes that each make regions of their own. */
#define AU_SERVERS 16

/* The process that we are, or one that we descend from. */
struct au_server {
	bool used;
	int send_fd;    /* for children; -1: lost */
	int receive_fd; /* our own, if it is us */
	int pidfd;      /* of the server, or -1 (before 5.3) */
	ino_t send_inode, receive_inode;
};

/* What is sent with a child's descriptors. */
#define AU_HELLO_MAGIC 0x61756368U
struct au_hello {
	uint32_t magic;
	int32_t pid;
	uint32_t regions;
	uint32_t reserved;
};

/* Held during fork, so that children find everything whole. */
void au_children_lock(void);
void au_children_unlock(void);
/* In a child, with the lock held: the servers of its parent, without the parent's children. */
struct au_server *au_children_forked(void);
/* With the lock held: all regions of `server` are closed, as by au_children_closed. */
void au_children_all_closed(int server);
/* With the lock held: a region of `server`, from *index on; NULL after the last one. */
struct au_region *au_children_next(int server, uint32_t *index, bool *closed);

#endif
